"""Memory, FLOPs and time of a report over the number of frames, one line per system and variant."""

from collections.abc import Callable, Mapping, Sequence
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


def draw_phases(report: Report, path: str, phases: Sequence[str], *, starts: str) -> None:
    """Writes a figure with one horizontal bar per row that has `phases_s`, a segment per phase, in seconds.

    Without such a row there is no figure yet.

    What the phases leave of a row's time is a segment of its own. Rows that have the phase `starts` take much
    longer and are a panel of their own.

    Args:
      report: what to draw.
      path: the file; its suffix chooses the format.
      phases: names in the order of time.
      starts: the phase that only new processes have.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if row.get("phases_s")]
    if not rows:
        return
    names = [name for name in phases if any(name in row["phases_s"] for row in rows)]
    colors = {name: f"C{index}" for index, name in enumerate(names)} | {"other": "lightgrey"}
    panels = [[row for row in rows if (starts in row["phases_s"]) is new] for new in (True, False)]
    panels = [panel for panel in panels if panel]
    figure, axes = plt.subplots(
        len(panels), squeeze=False, figsize=(11, 1.8 + 0.5 * len(rows)), layout="constrained",
        height_ratios=[len(panel) for panel in panels],
    )  # fmt: skip
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _draw_bars(axis, panel, colors)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(colors), fontsize="small")
    save(figure, report, "from a file to an answer", path)


def _draw_bars(axis: "Axes", rows: list[Row], colors: Mapping[str, str]) -> None:
    """One bar per row with a segment for each phase in `colors`, the last of which is what they leave."""
    ends = [0.0] * len(rows)
    for name, color in colors.items():
        rest = [max(1e-3 * row["ms"] - end, 0.0) for row, end in zip(rows, ends, strict=True)]
        widths = rest if name == "other" else [row["phases_s"].get(name, 0.0) for row in rows]
        axis.barh(range(len(rows)), widths, left=ends, color=color, label=name)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for number, end in enumerate(ends):
        axis.annotate(
            f"{end:.2f} s", (end, number), textcoords="offset points", xytext=(4, 0), va="center",
            fontsize="small",
        )  # fmt: skip
    labels = [f"{row['system']}: {row['what']}, {row['frames']} frames" for row in rows]
    axis.set(yticks=range(len(rows)), yticklabels=labels, xlabel="seconds", xlim=(0, 1.15 * max(ends)))
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")


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

    device = next((system["device"] for system in report["systems"] if "device" in system), None)
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
