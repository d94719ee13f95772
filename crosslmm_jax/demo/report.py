"""What the demo prints (a table, a frame, questions with answers) and its demo.json."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

import crosslmm_jax
from crosslmm_jax.demo.ask import AskedVideo
from crosslmm_jax.demo.synthetic import CHANCE
from crosslmm_jax.demo.train_and_evaluate import TrainedModel

if TYPE_CHECKING:
    from rich.text import Text

_PHASES = {
    "data": "videos and tokenizer",
    "stage1": "stage 1: projector and V2V, on captions",
    "stage2": "stage 2: everything, on questions and answers",
    "evaluation": "evaluation",
    "control": "control: both stages and evaluation",
    "questions": "questions and figure",
    "total": "total",
}


def print_table(
    trained: TrainedModel, control: TrainedModel, seconds: Mapping[str, float], *, in_parallel: bool
) -> None:
    """Prints accuracies on the held-out questions and the wall time of each phase."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{trained.num_questions} questions about held-out videos", title_justify="left")
    table.add_column("answered exactly")
    table.add_column("", justify="right")
    table.add_row("CrossLMM", f"{trained.accuracy:.1%}")
    table.add_row("control: V2V and T2V off", f"{control.accuracy:.1%}")
    table.add_row("chance", f"{CHANCE:.1%}", end_section=True)
    for phase, label in _PHASES.items():
        if phase == "control" and in_parallel:
            label += ", at the same time"
        if (control if phase == "control" else trained).reused and phase in ("stage1", "stage2", "control"):
            label += " (trained by an earlier call)"
        table.add_row(label, f"{seconds[phase]:.1f} s")
    Console().print(table)


def print_questions(asked: AskedVideo) -> None:
    """Prints questions with answers and, on a terminal, the frame that the first answer attended to most."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    frame, share = asked.most_read
    console.print(f"\n{asked.video}", soft_wrap=True)
    console.print(f"frame at {asked.times[frame]:.2f} s: {share:.0%} of the first answer's T2V attention")
    if console.is_terminal:
        console.print(frame_as_text(asked.frames[frame]))
    for one in asked.questions:
        mark = "right" if one.answer == one.true_answer else "wrong"
        console.print(f"  {one.question}  ->  {one.answer}  ({mark}: {one.true_answer})", soft_wrap=True)


def frame_as_text(frame: UInt8[np.ndarray, "r r 3"]) -> "Text":
    """Two pixels per character: a half block in two colours."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    text = Text()
    for upper, lower in zip(frame[::2].tolist(), frame[1::2].tolist(), strict=False):
        for high, low in zip(upper, lower, strict=True):
            text.append("▀", Style(color=Color.from_rgb(*high), bgcolor=Color.from_rgb(*low)))
        text.append("\n")
    return text


def demo_json(
    folder: Path,
    trained: TrainedModel,
    control: TrainedModel,
    seconds: Mapping[str, float],
    asked: AskedVideo,
    *,
    seed: int,
    quick: bool,
) -> dict[str, object]:
    """The content of `demo.json`."""
    videos = sorted((folder / "data" / "videos").glob("heldout_*.mp4"))
    packages = ("jax", "flax", "optax", "grain", "av", "numpy")
    return {
        "accuracy": trained.accuracy,
        "control_accuracy": control.accuracy,
        "chance": CHANCE,
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "model": str(folder / "model"),
        "heldout_videos": [str(video) for video in videos],
        "num_questions": trained.num_questions,
        "reused": {"model": trained.reused, "control": control.reused},
        "seed": seed,
        "quick": quick,
        "questions": [
            dataclasses.asdict(question) | {"video": str(asked.video)} for question in asked.questions
        ],
        "versions": {
            "crosslmm_jax": crosslmm_jax.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }
