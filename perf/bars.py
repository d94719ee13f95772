"""The project's numbers to reach: bars, goals and the paper's numbers, beside what a report measured."""

from collections.abc import Callable
from typing import NamedTuple

from crosslmm_jax.profiling import Report, Row
from crosslmm_jax.profiling.report import COLUMNS, cell, markdown, table

Reading = Callable[[list[Row]], float | None]  # from the rows of a report; None: not measured

# Columns of rows that only perf/ measures.
ALL_COLUMNS = COLUMNS | {
    "devices": "devices", "mesh": "mesh", "efficiency": "efficiency", "backend": "backend",
    "kv_splits": "KV splits", "parts": "KV splits", "clips": "clips", "weights": "weights",
    "products": "products", "cache": "T2V cache", "scales": "scales", "cosine_mean": "cosine",
    "cosine_min": "least cosine", "error_mean": "error", "error_max": "largest error", "rms": "rms",
    "kl_mean": "KL", "kl_max": "largest KL", "top1": "same top token",
}  # fmt: skip

# The paper's numbers of its models, measured on H800 (figure 4: 7B; table 6: 2B).
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
    reading: Reading

    @property
    def higher_is_better(self) -> bool:
        """Whether the goal is above the bar."""
        return self.goal > self.bar


def _find(rows: list[Row], system: str, what: str, frames: int, tokens: int | None = None) -> Row | None:
    """The row of the paper's model, with V2V over the whole video."""
    for row in rows:
        same = (row["system"], row["what"], row["frames"]) == (system, what, frames)
        same = same and is_bfloat16(row) and row.get("v2v_scope", "video") == "video"
        if same and (tokens is None or row["tokens_per_frame"] == tokens):
            return row
    return None


def is_bfloat16(row: Row) -> bool:
    """Whether a row counts for the bars, which are about bfloat16."""
    return row.get("precision", "bfloat16") == "bfloat16"


def _value(field: str, system: str, what: str, frames: int, tokens: int = 9) -> Reading:
    """Reads one field of one row."""

    def read(rows: list[Row]) -> float | None:
        row = _find(rows, system, what, frames, tokens)
        return None if row is None else row.get(field)

    return read


def _speedup(frames: int) -> Reading:
    """How many times faster the 7B prefill is than that of LLaVA-OneVision, eager or compiled."""

    def read(rows: list[Row]) -> float | None:
        ours = _find(rows, "crosslmm_7b", "prefill", frames, 9)
        names = ("llava-onevision-7b", "llava-onevision-7b-compiled")
        peers = [row["ms"] for name in names if (row := _find(rows, name, "prefill", frames))]
        return min(peers) / ours["ms"] if ours and peers else None

    return read


def _encoder_share(rows: list[Row]) -> float | None:
    """The best share of the matmul rate over the numbers of frames."""
    ours = [row for row in rows if row["what"] == "encoder" and row["system"].startswith("crosslmm")]
    return max((row["fraction_of_matmul"] for row in ours if is_bfloat16(row)), default=None)


def _training_share(rows: list[Row]) -> float | None:
    """The best share of the matmul rate over the forms of recomputation."""
    steps = [row for row in rows if (row["system"], row["what"], row["frames"]) == (_2B, "train", 64)]
    return max((row["fraction_of_matmul"] for row in steps if row["tokens_per_frame"] == 9), default=None)


def _efficiency(what: str) -> Reading:
    """The best efficiency on two devices over numbers of frames and meshes."""

    def read(rows: list[Row]) -> float | None:
        two = [row for row in rows if row["what"] == what and row["devices"] == 2 and "efficiency" in row]
        return max((row["efficiency"] for row in two), default=None)

    return read


def _most_frames(rows: list[Row]) -> float | None:
    """The longest video that ran in one pass, with V2V over all of it."""
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
    Bar("decode", "2B, 256 frames: time per token over the time to read memory once", None, 2.5, 1.4, "x",
        _value("over_floor", _2B, "decode", 256)),
    Bar("train", "2B, 64 frames: stage 2 step, share of the matmul rate", None, 0.45, 0.60, "",
        _training_share),
    Bar("scaling", "2 devices against 1, same work on each: encoder, pool, projector", None, 0.90, 0.97, "",
        _efficiency("encode")),
    Bar("scaling", "2 devices against 1, same work on each: stage 2 step", None, 0.90, 0.97, "",
        _efficiency("train")),
    Bar("long_video", "2B: frames in one forward pass", 256, 4096, 16384, "frames", _most_frames),
)  # fmt: skip


def with_bars(report: Report) -> Row:
    """The report with each bar that its rows can answer, with the reading."""
    lines = []
    for bar in BARS:
        reading = bar.reading(report["rows"]) if bar.task == report["task"] else None
        if reading is not None:
            sign = 1 if bar.higher_is_better else -1
            lines.append({
                "what": bar.what, "unit": bar.unit, "paper": bar.paper, "bar": bar.bar, "goal": bar.goal,
                "reading": reading, "meets_bar": sign * reading >= sign * bar.bar,
                "meets_goal": sign * reading >= sign * bar.goal,
            })  # fmt: skip
    return {**report, "bars": lines}


def page(report: Report) -> str:
    """The report as a page, with a table of the bars."""
    lines = with_bars(report)["bars"]
    head = ("what", "paper", "bar", "goal", "reading", "meets")
    summary = table(head, map(_cells, lines)) if lines else []
    return markdown(report, columns=ALL_COLUMNS, summary=summary)


def _cells(bar: Row) -> list[str]:
    meets = "goal" if bar["meets_goal"] else "bar" if bar["meets_bar"] else "neither"
    values = [bar[name] for name in ("paper", "bar", "goal", "reading")]
    with_unit = ["-" if value is None else f"{cell(value)} {bar['unit']}".strip() for value in values]
    return [bar["what"], *with_unit, meets]
