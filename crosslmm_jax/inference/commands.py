"""`crosslmm ask` and `crosslmm chat`: what they print and write."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from crosslmm_jax.config import Precision
from crosslmm_jax.data.text import check_question
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.figure import draw_attention
from crosslmm_jax.inference.generate import Sampling
from crosslmm_jax.inference.load import load


def ask(
    model: str,
    video: str,
    question: str,
    *,
    frames: int | None,
    precision: Precision | None,
    json_path: str | None,
    attention_path: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Prints the answer to one question.

    Args:
      model: MODEL folder.
      video: the file.
      question: the question.
      frames: number of frames to read; None: as in training.
      precision: see `load`.
      json_path: a path writes the answer as JSON there too; "-" prints JSON instead of the answer.
      attention_path: PNG file to draw the answer's T2V attention in.
      max_new_tokens: longest answer, tokens.
      temperature: of sampling; 0 is greedy.
      top_p: of sampling.
      seed: of sampling.

    Raises:
      UserError: an input cannot be read, an output cannot be written, or an option is out of range.
    """
    check_question(question)
    for option, path in (("--json", json_path), ("--attention", attention_path)):
        _check_output(option, path)
    loaded = load(model, precision)
    if attention_path is not None and "t2v" not in loaded.config.cross_attention.directions:
        raise UserError(
            f"--attention {attention_path}: {model} has no T2V, so there is no attention to draw; leave the"
            " option out"
        )
    watched = loaded.watch(video, frames=frames)
    sampling = Sampling(temperature, top_p)
    answer = watched.answer(question, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    if attention_path is not None:
        maps = watched.attention(question)
        draw_attention(
            attention_path, watched.frames, watched.frame_times, maps, title=f"{question} {answer.text}"
        )
    report = {
        "question": question,
        "answer": answer.text,
        "video": str(video),
        "frame_times": [round(float(t), 3) for t in watched.frame_times],
        "tokens": answer.num_tokens,
        "seconds": round(answer.seconds, 3),
        "tokens_per_second": round(answer.tokens_per_second, 2),
    }
    if json_path != "-":
        print(answer.text)
    if json_path is not None:
        _write_json(json_path, report)


def chat(
    model: str,
    video: str,
    *,
    frames: int | None,
    precision: Precision | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Reads questions line by line and streams answers, until an empty line or the end of the input.

    Arguments as for `ask`.
    """
    watched = load(model, precision).watch(video, frames=frames)
    conversation = watched.chat(
        max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_p), seed=seed
    )
    if sys.stdin.isatty():
        print(f"{len(watched.frames)} frames read. Ask a question; an empty line ends the chat.")
    while (question := _read_question()).strip():
        for piece in conversation.ask(question):
            print(piece, end="", flush=True)
        print()


def _read_question() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _check_output(option: str, path: str | None) -> None:
    """Raises a UserError for an output that cannot be written, before the model is loaded."""
    if path in (None, "-"):
        return
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: the folder {folder} does not exist; create it or name another")
    if Path(path).is_dir():
        raise UserError(f"{option} {path}: this is a folder; name a file")


def _write_json(path: str, value: Mapping[str, object]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}; name a file that can be written") from error
