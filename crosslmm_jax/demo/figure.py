"""`demo.png`: how both runs learned, and where the model looked to answer a question."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from crosslmm_jax.inference import draw_frame

Lines = Sequence[dict[str, Any]]


def draw(
    metrics: Sequence[Lines],
    control: Sequence[Lines],
    *,
    frames: UInt8[np.ndarray, "f r r 3"],
    times: Float[np.ndarray, " f"],
    attention: Float[np.ndarray, "x f p"],
    title: str,
) -> bytes:
    """The figure as PNG.

    Args:
      metrics: of each stage, the lines of its metrics.jsonl.
      control: the same of the run without cross-attention.
      frames: uint8[F, R, R, 3] of the video that was asked about.
      times: float32[F], seconds.
      attention: float32[X, F, P] of `Video.attention`; layers are averaged.
      title: question and answer, written above the frames.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    top, bottom = halves
    loss, gates = top.subplots(1, 2)
    _draw_loss(loss, metrics, control)
    _draw_gates(gates, metrics)
    axes = bottom.subplots(2, len(frames), squeeze=False)
    share = attention.mean(axis=0)
    for index, (plain, read) in enumerate(axes.T):
        plain.imshow(frames[index], extent=(0, 1, 1, 0))
        plain.axis("off")
        plain.set_title(f"{times[index]:.2f} s", fontsize=9)
        draw_frame(read, frames[index], share[index], highest=float(share.max()))
        read.set_title(f"T2V attention: {share[index].sum():.0%}", fontsize=9)
    bottom.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def _joined(stages: Sequence[Lines]) -> tuple[list[int], list[dict[str, Any]], list[int]]:
    """Steps counted through all stages, their lines, and where each stage ends."""
    steps, lines, ends, before = [], [], [], 0
    for stage in stages:
        steps += [before + line["step"] for line in stage]
        lines += stage
        before = steps[-1]
        ends.append(before)
    return steps, lines, ends


def _draw_loss(axis: Any, metrics: Sequence[Lines], control: Sequence[Lines]) -> None:
    for stages, label in ((metrics, "CrossLMM"), (control, "control: V2V and T2V off")):
        steps, lines, ends = _joined(stages)
        axis.plot(steps, [line["loss"] for line in lines], label=label)
        for end in ends[:-1]:
            axis.axvline(end, color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="step (dotted: stage 2 begins)", ylabel="nats a target", title="loss", yscale="log")
    axis.legend()


def _draw_gates(axis: Any, metrics: Sequence[Lines]) -> None:
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
