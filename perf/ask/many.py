"""Questions per second on work like Video-MME: three questions per video, answers of a few tokens.

`answer_many` reads each video once and answers its questions together. Against it: every question by itself,
as a loop over `watch` and `ask` does, and the same loop that keeps each watched video for its questions.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from crosslmm_jax.errors import UserError
from crosslmm_jax.profiling import Record, Request, Row, timing

if TYPE_CHECKING:
    from crosslmm_jax.inference import VideoModel

TOKENS = 16  # most tokens of an answer, as lmms-eval asks of Video-MME
STEMS = (
    "Which of these happens first in the video?", "What is the main topic of the video?",
    "How many people can be seen in the last scene, counted once each?",
)  # fmt: skip
OPTIONS = "A. One of them.\nB. Two of them.\nC. The one on the left.\nD. None of the others."
PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only"
    " the letter (A, B, C, or D) of the correct option.\n{stem}\n{options}\nThe best answer is:"
)
Work = list[tuple[str, str]]  # (video, question)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyRequest(Request):
    """A MODEL folder and a folder of videos."""

    model: str
    videos: str


def work_of(folder: str | Path) -> Work:
    """Each .mp4 file of `folder` with its questions, the questions of a video in a row."""
    files = sorted(Path(folder).glob("*.mp4"))
    questions = [PROMPT.format(stem=stem, options=OPTIONS) for stem in STEMS]
    return [(str(file), question) for file in files for question in questions]


def run(record: Record) -> None:
    """A row per way to answer all questions."""
    from crosslmm_jax.inference import load

    request = record.request
    assert isinstance(request, ManyRequest)
    work, frames = work_of(request.videos), request.frames[0]
    model = load(request.model)
    ways: dict[str, Callable[[VideoModel, Work, int], int]] = {
        "questions one by one": one_by_one, "questions one by one, videos kept": videos_kept,
        "questions together": together,
    }  # fmt: skip
    for what, answer in ways.items():
        try:
            # Compiles. Together, all of them: the shapes depend on how many there are.
            answer(model, work if answer is together else work[: len(STEMS)], frames)
            begin = time.perf_counter()
            tokens = answer(model, work, frames)
            seconds = time.perf_counter() - begin
            record.add_row(row_of(what, frames, len(work), tokens, seconds))
        except Exception as error:  # one way must not end the others
            record.add_error(what, error)
    record.add_facts(**timing.device_facts())


def row_of(what: str, frames: int, questions: int, tokens: int, seconds: float) -> Row:
    """Questions per second, and how many tokens the answers had."""
    return {
        "what": what, "frames": frames, "questions": questions, "tokens": tokens, "ms": 1e3 * seconds,
        "questions_per_second": questions / seconds,
    }  # fmt: skip


def one_by_one(model: "VideoModel", work: Work, frames: int) -> int:
    """Each question with its video from the file; returns the tokens of all answers."""
    answers = (model.watch(path, frames=frames).answer(text, max_new_tokens=TOKENS) for path, text in work)
    return sum(answer.num_tokens for answer in answers)


def videos_kept(model: "VideoModel", work: Work, frames: int) -> int:
    """Each question by itself, a video read once for its questions."""
    tokens = 0
    for path in dict.fromkeys(path for path, _ in work):
        video = model.watch(path, frames=frames)
        for text in (text for of, text in work if of == path):
            tokens += video.answer(text, max_new_tokens=TOKENS).num_tokens
    return tokens


def together(model: "VideoModel", work: Work, frames: int) -> int:
    """All questions in one call."""
    from crosslmm_jax.inference import AnswerOptions, Item, answer_many

    options = AnswerOptions(max_new_tokens=TOKENS)
    tokens = 0
    for answer in answer_many(model, [Item(*asked, options) for asked in work], frames=frames):
        if isinstance(answer, UserError):
            raise answer
        tokens += answer.num_tokens
    return tokens
