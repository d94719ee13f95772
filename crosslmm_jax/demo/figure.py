"""`demo.png`: loss and gates of both runs, and what the model attended to for one answer."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from crosslmm_jax.inference import draw_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MetricsLines = Sequence[dict[str, Any]]  # of metrics.jsonl, one stage


def draw(
    metrics: Sequence[MetricsLines],
    control: Sequence[MetricsLines],
    *,
    frames: UInt8[np.ndarray, "f r r 3"],
    times: Float[np.ndarray, " f"],
    attention: Float[np.ndarray, "x f p"],
    title: str,
) -> bytes:
    """The figure as PNG.

    Args:
      metrics: lines of metrics.jsonl, one entry per stage.
      control: the same for the run without cross-attention.
      frames: uint8[F, R, R, 3] of the video.
      times: float32[F], seconds.
      attention: float32[X, F, P] of `Video.attention`; layers are averaged.
      title: question and answer, shown above the frames.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.35)).ravel()
    loss, gates = top.subplots(1, 2)
    _draw_loss(loss, metrics, control)
    _draw_gates(gates, metrics)
    axes = bottom.subplots(2, len(frames), squeeze=False)
    share = attention.mean(axis=0)
    for index, (upper, lower) in enumerate(axes.T):
        upper.imshow(frames[index], extent=(0, 1, 1, 0))
        upper.axis("off")
        upper.set_title(f"{times[index]:.2f} s", fontsize=9)
        draw_frame(lower, frames[index], share[index], highest=float(share.max()))
        lower.set_title(f"T2V attention: {share[index].sum():.0%}", fontsize=9)
    bottom.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _joined(stages: Sequence[MetricsLines]) -> tuple[list[int], MetricsLines, list[int]]:
    """Steps counted over all stages, their lines, and the last step of each stage."""
    steps, lines, ends, before = [], [], [], 0
    for stage in stages:
        steps += [before + line["step"] for line in stage]
        lines += stage
        before = steps[-1]
        ends.append(before)
    return steps, lines, ends


def _draw_loss(axis: "Axes", metrics: Sequence[MetricsLines], control: Sequence[MetricsLines]) -> None:
    for stages, label in ((metrics, "CrossLMM"), (control, "control: V2V and T2V off")):
        steps, lines, ends = _joined(stages)
        axis.plot(steps, [line["loss"] for line in lines], label=label)
        for end in ends[:-1]:
            axis.axvline(end, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="step (dotted: stage 2 begins)", ylabel="nats per target", title="loss", yscale="log")
    axis.legend()


def _draw_gates(axis: "Axes", metrics: Sequence[MetricsLines]) -> None:
    steps, lines, ends = _joined(metrics)
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for step, line in zip(steps, lines, strict=True):
        for direction, layers in line["gate"].items():
            for layer, value in layers.items():
                curves.setdefault((direction, layer), []).append((step, value))
    for (direction, layer), points in curves.items():
        axis.plot(*zip(*points, strict=True), label=f"{direction.upper()} layer {layer}")
    for end in ends[:-1]:
        axis.axvline(end, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="step", ylabel="tanh(gate)", title="gates of cross-attention")
    axis.legend()
