"""Watch a video once, ask many questions, and see which frames each answer looked at.

Run: python examples/ask_many_questions.py runs/demo clip.mp4 "What shape is the red object?"
"""

import argparse

from crosslmm_jax import load


def main() -> None:
    """Prints each answer, its speed, and the frame that the first generated token read most."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a MODEL folder, such as runs/demo")
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("questions", metavar="QUESTION", nargs="+")
    parser.add_argument("--frames", type=int, help="frames to read (default: as in training)")
    args = parser.parse_args()

    video = load(args.model).watch(args.video, frames=args.frames)  # encoded once
    for question in args.questions:
        answer = video.answer(question, max_new_tokens=32)
        weights = video.attention(question).mean(axis=0).sum(axis=1)  # [X, F, P] -> one weight per frame
        frame = int(weights.argmax())
        print(f"Q: {question}")
        print(f"A: {answer.text}  ({answer.num_tokens} tokens in {answer.seconds:.2f} s)")
        print(f"   most read: frame {frame} at {video.frame_times[frame]:.1f} s, {weights[frame]:.0%}")


if __name__ == "__main__":
    main()
