"""The paper's figure 4 drawn again: memory, FLOPs and time over frames, of ours, the peer and the paper."""

from typing import TYPE_CHECKING

from crosslmm_jax.profiling import Report, Row, figure
from perf.bars import PAPER, PAPER_FRAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIANTS = (*figure.VARIANTS, "backend", "kv_splits", "parts", "mesh", "devices")


def draw(report: Report, path: str) -> None:
    """Writes the figure of a report to `path`; the file's suffix chooses the format."""
    figure.draw(report, path, variants=VARIANTS, annotate=_annotate)


def _annotate(axis: "Axes", field: str, lines: figure.Lines) -> None:
    """Adds the paper's points, and how many times less the 7B model takes than its peer."""
    for index, rows in enumerate(lines.values()):
        system = rows[0]["system"]
        if system in PAPER and _is_of_the_paper(rows[0]):
            axis.plot(
                PAPER_FRAMES, PAPER[system][field], "o", color=f"C{index}", fillstyle="none",
                label=f"{system}, as printed in the paper",
            )  # fmt: skip
    rows = [row for line in lines.values() for row in line if _is_of_the_paper(row)]
    found = {(row["system"], row["frames"]): row.get(field) for row in rows}
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


def _is_of_the_paper(row: Row) -> bool:
    """Whether a row measures what the paper's figure shows."""
    return row["what"] == "prefill" and row.get("v2v_scope", "video") == "video"
