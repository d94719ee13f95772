"""Ask the same questions about every video of a folder, and print each answer as soon as it is there.

Run: python examples/ask_many_questions.py runs/demo videos/ "What shape is the red object?"
"""

import argparse
from pathlib import Path

from crosslmm_jax import load
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import AnswerOptions, Item, answers_as_ready


def main() -> None:
    """Prints the answers, and for a video that cannot be read why."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a MODEL folder, such as runs/demo")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="its mp4 files are watched")
    parser.add_argument("questions", metavar="QUESTION", nargs="+")
    parser.add_argument("--frames", type=int, help="frames to read of each (default: as in training)")
    args = parser.parse_args()

    # Neighbouring questions about one video share its decoding and its encoding.
    options = AnswerOptions(max_new_tokens=32)
    videos = sorted(args.folder.rglob("*.mp4"))
    items = [Item(video, question, options) for video in videos for question in args.questions]
    for number, answer in answers_as_ready(load(args.model), items, frames=args.frames):
        text = f"error: {answer}" if isinstance(answer, UserError) else answer.text
        print(f"{items[number].media}: {items[number].question}\n  {text}")


if __name__ == "__main__":
    main()
