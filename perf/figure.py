"""The paper's figure 4 redrawn: memory, FLOPs and time over frames, ours, the peer's and the paper's."""

from typing import Any

from crosslmm_jax.profiling.report import PAPER, PAPER_FRAMES, Row

PANELS = {
    "peak_mb": "peak memory over weights (MB)",
    "model_tflop": "model FLOPs (TFLOP)",
    "ms": "time (ms)",
}

# Fields of a row that make another line; V2V over the whole video goes without saying.
KINDS = ("backend", "parts", "v2v_scope", "remat", "mesh", "devices")


def draw(report: dict[str, Any], path: str) -> None:
    """Writes the figure of a report to `path`; the file's ending says which format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = _lines(report["rows"])
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 4.2), layout="constrained")
    for axis, (field, label) in zip(axes, PANELS.items(), strict=True):
        for index, (name, rows) in enumerate(lines.items()):
            points = [(row["frames"], row[field]) for row in rows if row.get(field) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=f"C{index}", label=name)
            system = rows[0]["system"]
            if system in PAPER and _is_the_papers(rows[0]):
                axis.plot(
                    PAPER_FRAMES, PAPER[system][field], "o", color=f"C{index}", fillstyle="none",
                    label=f"{system}, as printed in the paper",
                )  # fmt: skip
        _write_reductions(axis, report["rows"], field)
        axis.set(xscale="log", yscale="log", xlabel="frames", title=label)
        counts = sorted({row["frames"] for row in report["rows"]})
        axis.set_xticks(counts, [str(count) for count in counts], minor=False)
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small")
    save(figure, report, report["task"], path)


def save(figure: Any, report: dict[str, Any], what: str, path: str) -> None:
    """Writes a finished figure, named after `what` and the report's device, and closes it."""
    import matplotlib.pyplot as plt

    device = next((system.get("device") for system in report["systems"]), None)
    figure.suptitle(f"{what} on {device}")
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def _lines(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by system and kind, each ordered by frames; of a prefill the form that the paper shows."""
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["frames"]):
        if row["what"] == "prefill+cache":
            continue
        name = ", ".join(
            [row["system"], *(str(row[kind]) for kind in KINDS if row.get(kind) not in (None, "video"))]
            + ([row["what"]] if row["what"] != "prefill" else [])
            + [f"{row['tokens_per_frame']} tokens a frame"]
            + [precision for precision in [row.get("precision")] if precision in ("fp8", "int8")]
        )
        lines.setdefault(name, []).append(row)
    return lines


def _is_the_papers(row: Row) -> bool:
    """Whether a row measures what the paper's figure shows."""
    return row["what"] == "prefill" and row.get("v2v_scope", "video") == "video"


def _write_reductions(axis: Any, rows: list[Row], field: str) -> None:
    """How many times less the 7B model takes than its peer, written at the peer's points."""
    found = {(row["system"], row["frames"]): row.get(field) for row in rows if _is_the_papers(row)}
    for (system, frames), value in found.items():
        ours = found.get(("crosslmm_7b", frames))
        if system == "llava-onevision-7b" and value and ours:
            axis.annotate(
                f"{value / ours:.1f}x",
                (frames, value),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
            )
