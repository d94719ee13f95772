"""Memory, FLOPs and time of a report over the number of frames, one line per system and variant."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from crosslmm_jax.profiling.record import Row
from crosslmm_jax.profiling.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "peak_mb": "peak memory over weights (MB)",
    "model_tflop": "model FLOPs (TFLOP)",
    "ms": "time (ms)",
}
VARIANTS = ("v2v_scope", "remat")  # fields of a row that make a line of their own

Lines = dict[str, list[Row]]  # label -> rows in the order of frames


def draw(
    report: Report,
    path: str,
    *,
    variants: Sequence[str] = VARIANTS,
    annotate: Callable[["Axes", str, Lines], None] | None = None,
) -> None:
    """Writes the figure of a report to `path`; the file's suffix chooses the format.

    Args:
      report: what to draw.
      path: the file.
      variants: fields of a row that make a line of their own.
      annotate: adds to a panel, given its axes, its field and the lines, the i-th in the color "Ci".
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = _lines(report["rows"], variants)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4.2), layout="constrained")
    for axis, (field, label) in zip(axes, PANELS.items(), strict=True):
        for index, (name, rows) in enumerate(lines.items()):
            points = [(row["frames"], row[field]) for row in rows if row.get(field) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=f"C{index}", label=name)
        if annotate is not None:
            annotate(axis, field, lines)
        scale_by_frames(axis, report["rows"], title=label)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    save(figure, report, report["task"], path)


def scale_by_frames(axis: "Axes", rows: list[Row], *, title: str) -> None:
    """Sets both scales to logarithms, with a tick at each number of frames."""
    axis.set(xscale="log", yscale="log", xlabel="frames", title=title)
    counts = sorted({row["frames"] for row in rows})
    axis.set_xticks(counts, [f"{count:,}" for count in counts], minor=False, rotation=45)
    axis.xaxis.minorticks_off()
    axis.grid(alpha=0.3)


def save(figure: "Figure", report: Report, what: str, path: str) -> None:
    """Writes a figure with a title of `what` and the report's device, and closes it."""
    import matplotlib.pyplot as plt

    device = next((system.get("device") for system in report["systems"]), None)
    figure.suptitle(f"{what} on {device}")
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def _lines(rows: list[Row], variants: Sequence[str]) -> Lines:
    """Rows by label. V2V over the whole video is not labelled; of a prefill the form without a cache."""
    lines: Lines = {}
    for row in sorted(rows, key=lambda row: row["frames"]):
        if row["what"] == "prefill+cache":
            continue
        words = [
            row["system"],
            *(str(row[name]) for name in variants if row.get(name) not in (None, "video")),
        ]
        words += [row["what"]] if row["what"] != "prefill" else []
        words.append(f"{row['tokens_per_frame']} tokens per frame")
        words += [row["precision"]] if row.get("precision") in ("fp8", "int8") else []
        lines.setdefault(", ".join(words), []).append(row)
    return lines
