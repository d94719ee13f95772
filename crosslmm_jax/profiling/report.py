"""The report of a profile: where it comes from, its rows, and the page that shows them."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from crosslmm_jax.profiling.record import Row

PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12", "torch", "transformers", "triton",
)  # fmt: skip
UNITS = (
    "ms: median; MB: 10^6 bytes; TFLOP: matrix products of the model, each needed pair once;"
    " of matmul: over the rate of a large bfloat16 product, for rows in 8 bits too"
)
# Field of a row -> heading of its column.
COLUMNS = {
    "system": "system", "what": "what", "frames": "frames", "tokens_per_frame": "tokens per frame",
    "precision": "precision", "v2v_scope": "V2V scope", "remat": "recomputed", "ms": "ms",
    "ms_min": "min", "ms_max": "max", "peak_mb": "peak MB", "model_tflop": "TFLOP", "tflops": "TFLOP/s",
    "fraction_of_matmul": "of matmul", "over_floor": "over floor", "compile_s": "compile s",
}  # fmt: skip


class Report(TypedDict):
    """What was measured, and how."""

    task: str
    command: str
    date: str
    commit: str | None
    versions: dict[str, str]
    units: str
    matmul_tflops: float | None  # of the first system that measured it
    systems: list[Row]  # name, facts and request of each process
    rows: list[Row]
    errors: list[str]


def new_report(task: str, *, command: str) -> Report:
    """A report without rows."""
    return {
        "task": task,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "units": UNITS,
        "matmul_tflops": None,
        "systems": [],
        "rows": [],
        "errors": [],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter for speed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The measured commit: CROSSLMM_COMMIT if it is set, else git's answer, else None."""
    if named := os.environ.get("CROSSLMM_COMMIT"):
        return named

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parents[2]
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def markdown(report: Report, *, columns: Mapping[str, str] = COLUMNS, summary: Sequence[str] = ()) -> str:
    """The report as a page: how it was run, the lines of `summary`, the rows, the errors.

    Args:
      report: what to show.
      columns: field of a row -> heading; a column is shown if a row has its field.
      summary: lines above the table of rows.
    """
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# {report['task']}", "", f"`{report['command']}`", "", f"Commit {report['commit']}; {named}."]
    for system in report["systems"]:
        rate = system.get("matmul_tflops")
        measured = f", bf16 matmul {rate:.0f} TFLOP/s" if rate else ""
        lines.append(f"- {system['system']}: {system.get('device', 'no device')}{measured}")
        lines += [f"  {system['note']}"] if "note" in system else []
        lines += _settings(system, report["rows"])
    lines += ["", *summary] if summary else []
    if report["rows"]:
        used = [name for name in columns if any(name in row for row in report["rows"])]
        # Cosines: with three digits all would read 1.
        digits = [".6f" if name.startswith("cosine") else ".3g" for name in used]
        cells = [[cell(row.get(name), form) for name, form in zip(used, digits, strict=True)]
                 for row in report["rows"]]  # fmt: skip
        lines += ["", *table([columns[name] for name in used], cells), "", f"Units: {report['units']}."]
    if report["errors"]:
        lines += ["", "Errors:", *(f"- {error}" for error in report["errors"])]
    return "\n".join(lines)


def _settings(system: Row, rows: list[Row]) -> list[str]:
    """The overrides, variables and compiler options that a system ran with, as a line below it."""
    options = [row.get("compiler_options") for row in rows if row["system"] == system["system"]]
    flat = {f"{name}={value}" for found in options if found for name, value in found.items()}
    flat |= {f"{name}={value}" for name, value in system.get("environment", {}).items()}
    overrides = " ".join(system.get("request", {}).get("overrides", ()))
    words = [*filter(None, [overrides]), *sorted(flat)]
    return [f"  - {', '.join(f'`{word}`' for word in words)}"] if words else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def cell(value: object, form: str = ".3g") -> str:
    """A value as a cell: "-" for None, numbers in the format `form`, large ones without a fraction."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:{form}}"
