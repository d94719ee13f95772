"""`crosslmm ask` and `crosslmm chat`."""

import argparse
import time
from typing import TYPE_CHECKING, get_args

from crosslmm_jax.cli.options import Commands, add_json_option, check_output, seed, write_json
from crosslmm_jax.config import MeshConfig, Precision
from crosslmm_jax.errors import UserError

if TYPE_CHECKING:
    from crosslmm_jax.inference import Medium, Options

_STARTED = time.perf_counter()  # this file is imported when the process starts


def add_ask_and_chat(commands: Commands) -> None:
    """Adds `ask` and `chat` to the commands of `crosslmm`."""
    ask = commands.add_parser(
        "ask", help="ask about a video, or many questions about many",
        epilog='Many questions: a line of FILE.jsonl is {"video": "a.mp4", "question": "What happens?"}. OUT'
        " gets the same lines with their answers; the same command continues after a stop.",
    )  # fmt: skip
    _add_generation_options(ask)
    ask.add_argument("video", metavar="VIDEO", nargs="?", help="a video, a picture or a folder of frames")
    ask.add_argument("question", metavar="QUESTION", nargs="?")
    add_json_option(ask)
    ask.add_argument("--timings", action="store_true", help="say where the time went, from the start on")
    ask.add_argument(
        "--attention", metavar="FIGURE", help="draw what the answer read: .png, .jpg, .webp, .svg, .pdf"
    )
    ask.add_argument("--questions", metavar="FILE.jsonl", help="answer these, in place of VIDEO and QUESTION")
    ask.add_argument("--out", metavar="FILE.jsonl", help="with --questions: where the answers go")
    ask.add_argument("--media-root", metavar="DIR", help="with --questions: where paths of videos start")
    ask.set_defaults(run=_ask)
    chat = commands.add_parser("chat", help="encode a video once, then ask as often as you like")
    _add_generation_options(chat)
    chat.add_argument("video", metavar="VIDEO", help="a video, a picture or a folder of frames")
    chat.set_defaults(run=_chat)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder that `crosslmm train` or `crosslmm demo` wrote"
    )
    parser.add_argument("--frames", type=int, metavar="N", help="frames to read (default: as in training)")
    parser.add_argument("--start", type=float, metavar="SECONDS", help="read VIDEO from here on")
    parser.add_argument("--end", type=float, metavar="SECONDS", help="read VIDEO up to here")
    parser.add_argument(
        "--precision", choices=get_args(Precision),
        help="of encoder, projector and video KV cache (default: as MODEL says)",
    )  # fmt: skip
    parser.add_argument(
        "--tensor", type=int, metavar="N",
        help="devices that share the weights; groups of so many divide the videos (default: as few as hold"
        " the weights)",
    )  # fmt: skip
    parser.add_argument(
        "--keyframes", action="store_true",
        help="read the keyframes nearest to the wanted times: faster for a long video, at other times",
    )  # fmt: skip
    parser.add_argument(
        "--yarn", action="store_true",
        help="scale positions if the frames need more than MODEL has (YaRN, documented for up to 4 times)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, all tokens")
    parser.add_argument("--seed", type=seed, default=0, help="of sampling, when the temperature is above 0")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends an answer"
    )
    parser.add_argument("--answer-prefix", default="", metavar="TEXT", help="how the answer begins")


def _ask(args: argparse.Namespace) -> None:
    if args.questions is not None:
        _ask_many(args)
        return
    if args.video is None or args.question is None:
        raise UserError("give VIDEO and QUESTION, or --questions and --out; see `crosslmm ask --help`")
    if args.out is not None or args.media_root is not None:
        raise UserError("--out and --media-root belong to --questions; leave them out, or use --json")
    if not args.question.strip():
        raise UserError('the question is empty; write one, e.g. "What is the man doing?"')
    for option, path in (("--json", args.json), ("--attention", args.attention)):
        check_output(option, path)
    from crosslmm_jax.inference import ask
    from crosslmm_jax.parallel import is_first_process

    report = ask(
        args.model, _part_of_video(args), args.question, frames=args.frames, precision=args.precision,
        mesh=_mesh(args), yarn=args.yarn, keyframes=args.keyframes, attention_path=args.attention,
        options=_options(args), started=_STARTED if args.timings else None,
    )  # fmt: skip
    if not is_first_process():
        return
    if args.json != "-":
        print(report["answer"])
        if args.timings:
            print(
                "".join(f"{phase:12}{value:9.3f} s\n" for phase, value in report["timings"].items()), end=""
            )
    if args.json is not None:
        write_json(args.json, report)


def _ask_many(args: argparse.Namespace) -> None:
    given = {
        "VIDEO": args.video,
        "--json": args.json,
        "--attention": args.attention,
        "--timings": args.timings or None,
        "--start": args.start,
        "--end": args.end,
    }
    for name in (name for name, value in given.items() if value is not None):
        raise UserError(f"--questions answers a file of questions; leave {name} out")
    if args.out is None:
        raise UserError("--questions needs --out FILE.jsonl, where the answers go")
    check_output("--out", args.out)
    from crosslmm_jax.inference import ask_many
    from crosslmm_jax.parallel import is_first_process

    written = ask_many(
        args.model, args.questions, args.out, media_root=args.media_root or "", frames=args.frames,
        precision=args.precision, mesh=_mesh(args), yarn=args.yarn, keyframes=args.keyframes,
        options=_options(args),
    )  # fmt: skip
    if is_first_process():
        print(written)


def _part_of_video(args: argparse.Namespace) -> "Medium":
    from crosslmm_jax.inference import Medium

    return Medium(args.video, args.start, args.end)


def _chat(args: argparse.Namespace) -> None:
    from crosslmm_jax.inference import chat

    chat(
        args.model, _part_of_video(args), frames=args.frames, precision=args.precision, mesh=_mesh(args),
        yarn=args.yarn, keyframes=args.keyframes, options=_options(args),
    )  # fmt: skip


def _mesh(args: argparse.Namespace) -> MeshConfig | None:
    """The mesh that `--tensor` asks for; None without it."""
    return None if args.tensor is None else MeshConfig(data=-1, tensor=args.tensor)


def _options(args: argparse.Namespace) -> "Options":
    """The fields of `AnswerOptions`."""
    from crosslmm_jax.inference import Options, Sampling

    return Options(
        max_new_tokens=args.max_new_tokens, sampling=Sampling(args.temperature, args.top_p), seed=args.seed,
        stop=args.stop, answer_prefix=args.answer_prefix,
    )  # fmt: skip
