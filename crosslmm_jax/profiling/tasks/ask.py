"""From a file to an answer, as a user meets it: new `crosslmm ask` processes, then one that stays warm.

The first process may compile; it leaves its programs on disk for the others. Of several runs the table has
the medians, phase by phase.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crosslmm_jax.errors import UserError
from crosslmm_jax.profiling import timing
from crosslmm_jax.profiling.figure import draw_phases
from crosslmm_jax.profiling.record import Record, Request, Row
from crosslmm_jax.profiling.report import COLUMNS, Report, markdown, table
from crosslmm_jax.profiling.suite import Presentation
from crosslmm_jax.utils import kill_with_parent

if TYPE_CHECKING:
    from crosslmm_jax.inference import Answer, Video, VideoModel

# Phases of one answer in the order of time; together they are its total. A warm process has those from decode
# on, a further answer the last one.
PHASES = ("imports", "load", "decode", "encode", "prefill", "answer")
# Phase -> parts of it that are shown beside it.
INSIDE = {"load": ("tokenizer", "weights"), "answer": ("first_token",)}
UNITS = (
    "seconds; of several runs the median, phase by phase, and of the total the least and the most too;"
    " load includes tokenizer and weights, and answer the first token; each phase is waited for; process: by"
    " the clock of another process, from its start to its end"
)
MORE_QUESTIONS = (
    "What happens first?", "What is on the left?", "Who can be seen, and where do they go?",
    "How does it end, and what could come after that?", "Which colours are there?",
)  # fmt: skip
OTHER_FRAMES = 3 / 4  # of the frames, for the other number of frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskRequest(Request):
    """A MODEL folder and a file, instead of a preset.

    Raises:
      UserError: the folder or a file is not there, or a count that cannot be measured.
    """

    model: str  # MODEL folder
    video: str
    other_video: str | None = None  # of another length, watched in the warm process too
    question: str = "What happens in this video?"
    max_new_tokens: int = 64
    users_allocator: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens}: give a number of at least 1")
        if len(self.frames) > 1:
            raise UserError("--frames: give one number; a second one is measured in the warm process")


def check_paths(request: AskRequest) -> None:
    """Raises a `UserError` for a MODEL or a video that is not there."""
    if not Path(request.model).is_dir():
        raise UserError(f"{request.model}: no such folder; name one that `crosslmm train` or `demo` wrote")
    for video in filter(None, (request.video, request.other_video)):
        if not Path(video).is_file():
            raise UserError(f"{video}: no such file; name a video")


def run(record: Record) -> None:
    """Measures new processes, then this one. What fails is noted, and the rest is measured."""
    request = record.request
    assert isinstance(request, AskRequest)
    for what, count in (("first process", 1), ("new process", request.repeats)):
        runs = []
        for _ in range(count):
            try:
                runs.append(in_new_process(request))
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                record.add_error(what, error)
        if runs:
            record.add_row({"what": what, **combined(runs)})
    _measure_warm(record, request)


def in_new_process(request: AskRequest) -> Row:
    """One answer by `crosslmm ask`: its seconds by phase, its tokens and frames.

    Raises:
      RuntimeError: the command failed; the message is the last line that it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        words = ["ask", request.model, request.video, request.question, "--json", str(path), "--timings"]
        words += ["--max-new-tokens", str(request.max_new_tokens)]
        words += [word for count in request.frames for word in ("--frames", str(count))]
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "crosslmm_jax.cli", *words], capture_output=True, text=True, check=False,
            preexec_fn=kill_with_parent,
        )  # fmt: skip
        wall = time.perf_counter() - begin
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(lines[-1])
        answer = json.loads(path.read_text(encoding="utf-8"))
    seconds = answer["timings"]
    inside = itertools.chain(*INSIDE.values())
    phases = {name: seconds[name] for name in (*PHASES, *inside) if name in seconds}
    return {
        "frames": len(answer["frame_times"]), "tokens": answer["tokens"], "phases": phases,
        "finish_reason": answer["finish_reason"], "total": seconds["total"], "process": wall,
    }  # fmt: skip


def _measure_warm(record: Record, request: AskRequest) -> None:
    """Rows of one process: a further answer, the same file watched again, another clip."""
    from crosslmm_jax.inference import load

    begin = time.perf_counter()
    model = load(request.model)
    record.add_facts(load_s=time.perf_counter() - begin)
    frames = request.frames[0] if request.frames else None
    watch = functools.partial(watch_and_answer, model, request)

    def once(path: str, frames: int | None) -> list[Row]:
        return [watch(path, frames)]

    begin = time.perf_counter()
    video = model.watch(request.video, frames=frames)
    video.answer(request.question, max_new_tokens=request.max_new_tokens)
    record.add_facts(first_answer_after_load_s=time.perf_counter() - begin)
    # Once each: the first time shows what a length costs that this process has not met.
    other = {"warm process, another clip": (request.other_video, frames)} if request.other_video else {}
    fewer = max(1, round(OTHER_FRAMES * len(video.frame_times)))
    other |= {"warm process, fewer frames": (request.video, fewer)}
    measures: dict[str, Callable[[], list[Row]]] = {
        **{what: functools.partial(once, *which) for what, which in other.items()},
        "warm process, the same clip": lambda: [watch(request.video, frames) for _ in range(request.repeats)],
        "further answer": lambda: further_answers(video, request),
    }
    for what, measured in measures.items():
        try:
            record.add_row({"what": what, **combined(measured())})
        except Exception as error:  # one of them must not end the others
            record.add_error(what, error)
    record.add_facts(**timing.device_facts())


def watch_and_answer(model: "VideoModel", request: AskRequest, path: str, frames: int | None) -> Row:
    """Seconds from the file `path` to the last token, in a process that has the model."""
    begin = time.perf_counter()
    video = model.watch(path, frames=frames, timed=True)
    answer = video.answer(request.question, max_new_tokens=request.max_new_tokens)
    return {
        **_facts(answer, frames=len(video.frame_times)), "total": time.perf_counter() - begin,
        "phases": {**video.seconds, "answer": answer.seconds, "first_token": answer.first_token_s},
    }  # fmt: skip


def _facts(answer: "Answer", *, frames: int) -> Row:
    return {"frames": frames, "tokens": answer.num_tokens, "finish_reason": answer.finish_reason}


def further_answers(video: "Video", request: AskRequest) -> list[Row]:
    """Answers to other questions about a video that has been watched."""
    found = []
    for number in range(request.repeats):
        question = MORE_QUESTIONS[number % len(MORE_QUESTIONS)]
        answer = video.answer(question, max_new_tokens=request.max_new_tokens)
        found.append({
            **_facts(answer, frames=len(video.frame_times)), "total": answer.seconds,
            "phases": {"answer": answer.seconds, "first_token": answer.first_token_s},
        })  # fmt: skip
    return found


def combined(runs: Sequence[Row]) -> Row:
    """Rows of several runs as one: medians of the phases, and the total in ms with all samples."""
    phases = {name: statistics.median(run["phases"][name] for run in runs) for name in runs[0]["phases"]}
    totals = timing.summary([1e3 * run["total"] for run in runs])
    answering = 1e3 * phases["answer"] if "answer" in phases else totals["ms"]
    walls = {"process_s": statistics.median(run["process"] for run in runs)} if "process" in runs[0] else {}
    return {
        "frames": runs[0]["frames"], "tokens": min(run["tokens"] for run in runs),
        "finish_reason": sorted({run["finish_reason"] for run in runs}), **totals,
        "tokens_per_second": 1e3 * runs[0]["tokens"] / answering, **walls, "phases_s": phases,
        "runs": list(runs),
    }  # fmt: skip


def page(
    report: Report,
    *,
    columns: Mapping[str, str] = COLUMNS,
    summary: Sequence[str] = (),
    phases: Sequence[str] = PHASES,
) -> str:
    """The report as a page: a table of answers with a column per phase, then the rows without phases.

    Args:
      report: what to show.
      columns: of the rows without phases, field -> heading.
      summary: lines above the tables.
      phases: in the order of time.
    """
    answers = [row for row in report["rows"] if row.get("phases_s")]
    names = [name for phase in phases for name in (phase, *INSIDE.get(phase, ()))]
    names = [name for name in names if any(name in row["phases_s"] for row in answers)]
    head = ["system", "what", "frames", "tokens", *(name.replace("_", " ") for name in names)]
    lines = table(
        [*head, "total", "least", "most", "process", "tokens/s"], (_cells(row, names) for row in answers)
    )
    rest = [row for row in report["rows"] if not row.get("phases_s")]
    above = [*summary, *([""] if summary else []), *(lines if answers else []), "", f"Units: {UNITS}."]
    return markdown({**report, "rows": rest}, columns=columns, summary=above)


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    seconds = [
        *(row["phases_s"].get(name) for name in names),
        *(1e-3 * row[n] for n in ("ms", "ms_min", "ms_max")),
    ]
    shown = ["-" if value is None else f"{value:.3f}" for value in seconds]
    words = [str(row[name]) for name in ("system", "what", "frames", "tokens")]
    process = f"{row['process_s']:.3f}" if "process_s" in row else "-"
    return [*words, *shown, process, f"{row['tokens_per_second']:.0f}"]


def with_units(report: Report) -> Row:
    """The report as JSON holds it."""
    return {**report, "units": UNITS}


def draw(report: Report, path: str, phases: Sequence[str] = PHASES) -> None:
    """Draws a bar per row, with a segment per phase, in the order of `phases`."""
    draw_phases(report, path, phases, starts="load")


PRESENTATION = Presentation(fields=with_units, page=page, draw=draw)
