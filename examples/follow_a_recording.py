"""Follow a file that is still being written, and answer a question about it again and again.

Run: python examples/follow_a_recording.py runs/demo recording.ts "What is happening?"

The file is MPEG-TS, Matroska or fragmented mp4. To try it without a camera, let ffmpeg write one slowly:

    ffmpeg -re -stream_loop 9 -i clip.mp4 -c copy -f mpegts recording.ts &

"-" reads it from a pipe:

    ffmpeg -i rtsp://camera -c copy -f mpegts - |
        python examples/follow_a_recording.py runs/demo - "Who is there?"
"""

import argparse
import sys

from crosslmm_jax import load
from crosslmm_jax.data.media import follow
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import Stream


def main() -> None:
    """Prints an answer every few seconds of video, and one at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="a MODEL folder, such as runs/demo")
    parser.add_argument("file", metavar="FILE", help="a file that is being written, or - for a pipe")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--fps", type=float, default=1.0, help="frames per second to read; default: 1")
    parser.add_argument(
        "--every", type=float, default=10.0, help="seconds of video between answers; default: 10"
    )
    parser.add_argument("--most-frames", type=int, default=256, help="frames to keep; default: 256")
    parser.add_argument("--when-full", choices=("thin", "drop"), default="thin", help="default: thin")
    parser.add_argument("--idle", type=float, default=10.0, help="end after so many seconds without news")
    args = parser.parse_args()
    try:
        watch(args)
    except UserError as error:  # such as a file that is not there
        sys.exit(f"error: {error}")


def watch(args: argparse.Namespace) -> None:
    """Reads the file to its end, and asks now and then."""
    model = load(args.model)
    stream = Stream(model, most_frames=args.most_frames, when_full=args.when_full)
    source = sys.stdin.buffer if args.file == "-" else args.file
    size, resampling = model.processor.image_size, model.processor.resampling
    asked_at = 0.0
    for frames, times in follow(source, size=size, resampling=resampling, fps=args.fps, idle_s=args.idle):
        stream.append(frames, times)
        if times[-1] - asked_at >= args.every:
            asked_at = float(times[-1])
            answer(stream, args.question)
    answer(stream, args.question)


def answer(stream: Stream, question: str) -> None:
    """Prints the answer about the video until now."""
    seen = stream.frame_times
    print(
        f"{seen[-1]:8.1f} s, {len(seen)} frames: {stream.watched().ask(question, max_new_tokens=32)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
