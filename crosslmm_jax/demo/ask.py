"""Questions about a held-out video, asked as a user would: load, watch, ask."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

NUM_QUESTIONS = 2


@dataclasses.dataclass(frozen=True)
class AnsweredQuestion:
    """A question with the model's answer and the true one."""

    question: str
    answer: str
    true_answer: str
    seconds: float  # of the first question: compilation included


@dataclasses.dataclass(frozen=True)
class AskedVideo:
    """Answered questions about one video.

    Attributes:
      video: the file.
      frames: uint8[F, R, R, 3], as the model saw them.
      times: float32[F], seconds.
      questions: with their answers.
      attention: float32[X, F, P] of the first question, see `Video.attention`.
    """

    video: Path
    frames: UInt8[np.ndarray, "f r r 3"]
    times: Float[np.ndarray, " f"]
    questions: list[AnsweredQuestion]
    attention: Float[np.ndarray, "x f p"]

    @property
    def most_read(self) -> tuple[int, float]:
        """The frame with the largest share of attention, averaged over layers, and that share."""
        shares = self.attention.mean(axis=0).sum(axis=1)
        return int(shares.argmax()), float(shares.max())


def ask_heldout_video(folder: Path, *, seed: int) -> AskedVideo:
    """Asks the model of the demo in `folder` about one held-out video; `seed` picks video and questions."""
    from crosslmm_jax.inference import load

    rows = json.loads((folder / "data" / "heldout.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)
    name = rows[rng.integers(len(rows))]["video"]
    rows_of_video = [row for row in rows if row["video"] == name]
    video = load(folder).watch(folder / "data" / name)
    questions = []
    for index in rng.permutation(len(rows_of_video))[:NUM_QUESTIONS]:
        human, gpt = (turn["value"] for turn in rows_of_video[index]["conversations"])
        question = human.removeprefix("<image>\n")
        answer = video.answer(question)
        questions.append(AnsweredQuestion(question, answer.text, gpt, answer.seconds))
    return AskedVideo(
        video=folder / "data" / name,
        frames=video.frames,
        times=video.frame_times,
        questions=questions,
        attention=video.attention(questions[0].question),
    )
