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
    "questions": "questions", "questions_per_second": "questions/s", "cpu_s": "CPU s", "gigabytes": "GB",
    "open_s": "open s",
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


def _median_of(what: str, field: str = "ms", unit: float = 1e-3) -> Reading:
    """Reads one field of the 2B model's row whose `what` begins so."""

    def read(rows: list[Row]) -> float | None:
        row = _row_of(rows, _2B, what)
        return None if row is None else unit * row[field]

    return read


def _row_of(rows: list[Row], system: str, what: str) -> Row | None:
    return next((row for row in rows if row["system"] == system and row["what"].startswith(what)), None)


def _another_clip(rows: list[Row]) -> float | None:
    """The slower of a clip of another length and another number of frames, each the first time."""
    first = ("warm process, another clip", "warm process, fewer frames")
    found = [row["ms"] for row in rows if row["system"] == _2B and row["what"] in first]
    return 1e-3 * max(found) if len(found) == len(first) else None


def _answer_speedup(rows: list[Row]) -> float | None:
    """How many times faster 7B is from the file to the last token than LLaVA-OneVision, both warm."""
    what = "warm process, the same clip"
    ours, peer = _row_of(rows, _7B, what), _row_of(rows, "llava-onevision-7b", what)
    same = ours and peer and (ours["tokens"], ours["frames"]) == (peer["tokens"], peer["frames"])
    return peer["ms"] / ours["ms"] if ours and peer and same else None


def _questions_speedup(rows: list[Row]) -> float | None:
    """Questions per second together over one by one."""
    together = _row_of(rows, _2B, "questions together")
    alone = next((row for row in rows if (row["system"], row["what"]) == (_2B, "questions one by one")), None)
    return alone["ms"] / together["ms"] if together and alone else None


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
    Bar("ask", "2B, 256 frames: new process to the last of 64 tokens, programs on disk", None, 12, 8, "s",
        _median_of("new process")),
    Bar("ask", "2B, 256 frames: a further answer of 64 tokens", None, 0.25, 0.17, "s",
        _median_of("further answer")),
    Bar("ask", "2B, 256 frames: tokens per second of a further answer", None, 400, 470, "",
        _median_of("further answer", "tokens_per_second", 1)),
    Bar("ask", "2B: another clip or number of frames in a warm process, 64 tokens", None, 1.5, 0.8, "s",
        _another_clip),
    Bar("ask", "7B, 256 frames: file to the last token, faster than LLaVA-OneVision-7B", None, 4, 6, "x",
        _answer_speedup),
    Bar("ask", "2B: three questions per video, together against one by one", None, 3, 5, "x",
        _questions_speedup),
    Bar("ask", "data index of ten clips: CPU time", None, 20, 10, "s", _median_of("data index", "cpu_s", 1)),
    Bar("ask", "start of the loader to the first batch on the device", None, 6, 4, "s",
        _median_of("first batch")),
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


def page(report: Report, *, show: Callable[..., str] = markdown) -> str:
    """The report as a page, with a table of the bars.

    Args:
      report: what to show.
      show: takes the report, `columns` and `summary`, as `markdown` does.
    """
    lines = with_bars(report)["bars"]
    head = ("what", "paper", "bar", "goal", "reading", "meets")
    summary = table(head, map(_cells, lines)) if lines else []
    return show(report, columns=ALL_COLUMNS, summary=summary)


def _cells(bar: Row) -> list[str]:
    meets = "goal" if bar["meets_goal"] else "bar" if bar["meets_bar"] else "neither"
    values = [bar[name] for name in ("paper", "bar", "goal", "reading")]
    with_unit = ["-" if value is None else f"{cell(value)} {bar['unit']}".strip() for value in values]
    return [bar["what"], *with_unit, meets]
