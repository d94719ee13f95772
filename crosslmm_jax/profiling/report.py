"""The report of a profile: where it comes from, its rows, and what they say about the project's bars."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "nvidia-cudnn-cu13",
    "nvidia-cudnn-cu12", "torch", "transformers", "triton",
)  # fmt: skip

# What the paper prints for its own models (figure 4: 7B; table 6: 2B), measured on H800.
PAPER_FRAMES = (32, 64, 128, 256)
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "crosslmm_7b": {
        "peak_mb": (1753, 1864, 2087, 2530),
        "model_tflop": (13.17, 25.92, 51.43, 102.42),
        "ms": (335, 578, 1063, 2019),
    },
    "crosslmm_2b": {
        "peak_mb": (715.61, 825.21, 1046.68, 1490.25),
        "model_tflop": (10.93, 21.77, 43.46, 86.82),
        "ms": (264, 505, 910, 1698),
    },
}


class Bar(NamedTuple):
    """One line of the project's table of numbers to reach."""

    task: str
    what: str
    paper: float | None
    bar: float
    goal: float
    unit: str
    reading: Callable[[list[Row]], float | None]

    @property
    def higher_is_better(self) -> bool:
        """Which way the goal lies from the bar."""
        return self.goal > self.bar


def _find(rows: list[Row], system: str, what: str, frames: int, tokens: int | None = None) -> Row | None:
    """The row of the paper's model, whose V2V reads the whole video."""
    for row in rows:
        same = (row["system"], row["what"], row["frames"]) == (system, what, frames)
        same = same and is_wide(row) and row.get("v2v_scope", "video") == "video"
        if same and (tokens is None or row["tokens_per_frame"] == tokens):
            return row
    return None


def is_wide(row: Row) -> bool:
    """Whether a row answers the bars, which are about bfloat16."""
    return row.get("precision", "bfloat16") == "bfloat16"


def _value(
    field: str, system: str, what: str, frames: int, tokens: int = 9
) -> Callable[[list[Row]], float | None]:
    """Reads one field of one row."""

    def read(rows: list[Row]) -> float | None:
        row = _find(rows, system, what, frames, tokens)
        return None if row is None else row.get(field)

    return read


def _speedup(frames: int) -> Callable[[list[Row]], float | None]:
    """How many times faster the 7B prefill is than LLaVA-OneVision's, its best variant."""

    def read(rows: list[Row]) -> float | None:
        ours = _find(rows, "crosslmm_7b", "prefill", frames, 9)
        names = ("llava-onevision-7b", "llava-onevision-7b-compiled")
        peers = [row["ms"] for name in names if (row := _find(rows, name, "prefill", frames))]
        return min(peers) / ours["ms"] if ours and peers else None

    return read


def _encoder_share(rows: list[Row]) -> float | None:
    """The best share of the matmul rate over the frame counts measured."""
    ours = [
        row
        for row in rows
        if row["what"] == "encoder" and row["system"].startswith("crosslmm") and is_wide(row)
    ]
    return max((row["fraction_of_matmul"] for row in ours), default=None)


def _training_share(rows: list[Row]) -> float | None:
    """The best share of the matmul rate over what may be recomputed."""
    steps = [row for row in rows if (row["system"], row["what"], row["frames"]) == (_2B, "train", 64)]
    return max((row["fraction_of_matmul"] for row in steps if row["tokens_per_frame"] == 9), default=None)


def _efficiency(what: str) -> Callable[[list[Row]], float | None]:
    """The best efficiency on two devices over frame counts and meshes."""

    def read(rows: list[Row]) -> float | None:
        two = [row for row in rows if row["what"] == what and row["devices"] == 2 and "efficiency" in row]
        return max((row["efficiency"] for row in two), default=None)

    return read


def _most_frames(rows: list[Row]) -> float | None:
    """The longest video that went through in one pass, V2V over all of it."""
    whole = [row for row in rows if row["system"] == _2B and row.get("v2v_scope", "video") == "video"]
    return max((row["frames"] for row in whole), default=None)


_2B, _7B = "crosslmm_2b", "crosslmm_7b"
BARS = (
    Bar("prefill", "7B, 256 frames: faster than LLaVA-OneVision-7B", 2.0, 5, 8, "x", _speedup(256)),
    Bar("prefill", "7B, 32 frames: faster than LLaVA-OneVision-7B", 1.65, 4, 6, "x", _speedup(32)),
    Bar("prefill", "7B, 256 frames: peak over weights", 2530, 2100, 1200, "MB",
        _value("peak_mb", _7B, "prefill", 256)),
    Bar("prefill", "2B, 32 frames: prefill", 264, 65, 40, "ms", _value("ms", _2B, "prefill", 32)),
    Bar("prefill", "2B, 256 frames: prefill", 1698, 460, 250, "ms", _value("ms", _2B, "prefill", 256)),
    Bar("prefill", "2B, 32 frames: peak over weights", 716, 600, 400, "MB",
        _value("peak_mb", _2B, "prefill", 32)),
    Bar("prefill", "2B, 256 frames: peak over weights", 1490, 1200, 800, "MB",
        _value("peak_mb", _2B, "prefill", 256)),
    Bar("encoder", "encoder, share of the matmul rate", None, 0.70, 0.85, "", _encoder_share),
    Bar("decode", "2B, 256 frames: a token over the time to read memory once", None, 2.5, 1.4, "x",
        _value("over_floor", _2B, "decode", 256)),
    Bar("train", "2B, 64 frames: stage 2 step, share of the matmul rate", None, 0.45, 0.60, "",
        _training_share),
    Bar("scaling", "2 devices against 1, same work each: encoder, pool and projector", None, 0.90, 0.97, "",
        _efficiency("encode")),
    Bar("scaling", "2 devices against 1, same work each: stage 2 step", None, 0.90, 0.97, "",
        _efficiency("train")),
    Bar("long_video", "2B: frames in one forward pass", 256, 4096, 16384, "frames", _most_frames),
)  # fmt: skip


def new_report(task: str, *, command: str) -> dict[str, Any]:
    """A report without rows."""
    return {
        "task": task,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "units": "ms: median; MB: 10^6 bytes; TFLOP: matrix products of the model, each needed pair once;"
        " of matmul: over the rate of a large bfloat16 product, for rows in 8 bits too",
        "systems": [],
        "rows": [],
        "errors": [],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter to speed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that is measured: CROSSLMM_COMMIT where it is set, else what git says, else None."""
    if named := os.environ.get("CROSSLMM_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changes else "")


def with_bars(report: dict[str, Any]) -> dict[str, Any]:
    """The report with the measured matmul rate, and each bar that its rows can answer, with the reading."""
    lines = []
    for bar in BARS:
        reading = bar.reading(report["rows"]) if bar.task == report["task"] else None
        if reading is None:
            continue
        sign = 1 if bar.higher_is_better else -1
        lines.append(
            {
                "what": bar.what,
                "unit": bar.unit,
                "paper": bar.paper,
                "bar": bar.bar,
                "goal": bar.goal,
                "reading": reading,
                "meets_bar": sign * reading >= sign * bar.bar,
                "meets_goal": sign * reading >= sign * bar.goal,
            }  # fmt: skip
        )
    rates = [system["matmul_tflops"] for system in report["systems"] if "matmul_tflops" in system]
    return {**report, "matmul_tflops": rates[0] if rates else None, "bars": lines}


COLUMNS = {
    "system": "system", "what": "what", "frames": "frames", "tokens_per_frame": "tokens a frame",
    "precision": "precision", "v2v_scope": "V2V scope", "remat": "recomputed", "devices": "devices",
    "mesh": "mesh", "ms": "ms",
    "ms_min": "min", "ms_max": "max", "peak_mb": "peak MB", "model_tflop": "TFLOP", "tflops": "TFLOP/s",
    "fraction_of_matmul": "of matmul", "over_floor": "over floor",
    "efficiency": "efficiency", "backend": "backend", "parts": "parts",
    "compile_s": "compile s", "clips": "clips", "weights": "weights", "products": "products",
    "cache": "T2V cache", "scales": "scales", "cosine_mean": "cosine", "cosine_min": "least",
    "error_mean": "error", "error_max": "largest", "rms": "rms", "kl_mean": "KL", "kl_max": "largest KL",
    "top1": "same top token",
}  # fmt: skip
DIGITS = {"cosine_mean": ".6f", "cosine_min": ".6f"}  # three would all read 1


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: how it was run, the bars, the rows."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"# {report['task']}",
        "",
        f"`{report['command']}`",
        "",
        f"Commit {report['commit']}; {versions}.",
    ]
    for system in report["systems"]:
        rate = system.get("matmul_tflops")
        measured = f", bf16 matmul {rate:.0f} TFLOP/s" if rate else ""
        lines.append(f"- {system['system']}: {system.get('device', 'no device')}{measured}")
        lines += [f"  {system['note']}"] if "note" in system else []
        lines += _settings(system, report["rows"])
    if report.get("bars"):
        head = ("what", "paper", "bar", "goal", "reading", "meets")
        lines += ["", *_table(head, [_bar_cells(bar) for bar in report["bars"]])]
    if report["rows"]:
        used = [name for name in COLUMNS if any(name in row for row in report["rows"])]
        cells = [[_cell(row.get(name), DIGITS.get(name, ".3g")) for name in used] for row in report["rows"]]
        lines += ["", *_table([COLUMNS[name] for name in used], cells), "", f"Units: {report['units']}."]
    if report["errors"]:
        lines += ["", "Errors:", *(f"- {error}" for error in report["errors"])]
    return "\n".join(lines)


def _settings(system: dict[str, Any], rows: list[Row]) -> list[str]:
    """The variables and compiler options that a system ran with, as points below it."""
    options = [row.get("compiler_options") for row in rows if row["system"] == system["system"]]
    flat = {f"{name}={value}" for found in options if found for name, value in found.items()}
    flat |= {f"{name}={value}" for name, value in system.get("environment", {}).items()}
    overrides = system.get("request", {}).get("overrides", ())
    words = [*overrides, *sorted(flat)]
    return [f"  - {', '.join(f'`{word}`' for word in words)}"] if words else []


def _bar_cells(bar: dict[str, Any]) -> list[str]:
    meets = "goal" if bar["meets_goal"] else "bar" if bar["meets_bar"] else "neither"
    values = [bar[name] for name in ("paper", "bar", "goal", "reading")]
    with_unit = ["-" if value is None else f"{_cell(value)} {bar['unit']}".strip() for value in values]
    return [bar["what"], *with_unit, meets]


def _table(head: Any, rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _cell(value: Any, digits: str = ".3g") -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:{digits}}"
