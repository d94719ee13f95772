"""The `crosslmm` command: parses, then imports the one room that does the work.

Nothing heavy is imported here, so that `crosslmm --help` answers at once. A user's mistake ends as one
line on stderr and exit code 2; `--debug` shows where it was found.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import crosslmm_jax
from crosslmm_jax.errors import UserError

USER_MISTAKE = 2  # exit code, as argparse uses
INTERRUPTED = 130  # exit code, 128 + SIGINT, as shells use


class _OneLineParser(argparse.ArgumentParser):
    """argparse without the usage block in front of an error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _demo(args: argparse.Namespace) -> None:
    from crosslmm_jax.demo import run

    run(args.out, seed=args.seed, quick=args.quick)


def _params(args: argparse.Namespace) -> None:
    from crosslmm_jax.presets import get_preset
    from crosslmm_jax.profiling import params

    config = get_preset(args.preset)
    if args.json != "-":
        print(params.table(args.preset, config))
    if args.json is not None:
        _write_json(args.json, params.count(config))


def _train(args: argparse.Namespace) -> None:
    from crosslmm_jax.config_io import load_experiment

    config = load_experiment(args.config, args.overrides)
    from crosslmm_jax.train.loop import train  # after the config: a mistake in it shows before jax starts

    train(config)


def _ask(args: argparse.Namespace) -> None:
    if not args.question.strip():
        raise UserError('the question is empty; write one, e.g. "What is the man doing?"')
    from crosslmm_jax.inference.commands import ask

    ask(
        args.model, args.video, args.question, frames=args.frames, json_path=args.json,
        attention_path=args.attention, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
        top_p=args.top_p, seed=args.seed,
    )  # fmt: skip


def _chat(args: argparse.Namespace) -> None:
    from crosslmm_jax.inference.commands import chat

    chat(
        args.model, args.video, frames=args.frames, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip


def _write_json(target: str, payload: object) -> None:
    """Prints `payload` when `target` is "-", else writes it to that file."""
    text = json.dumps(payload, indent=2)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--json {target}: {reason}; give a file in a folder that can be written") from error


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder that `crosslmm train` or `crosslmm demo` wrote"
    )
    parser.add_argument("video", metavar="VIDEO", help="a video file")
    parser.add_argument("--frames", type=int, metavar="N", help="frames to read (default: as in training)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, no cut")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, when the temperature is above 0")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand; `args.run` is the function to call."""
    parser = _OneLineParser(prog="crosslmm", description="CrossLMM: train it and ask it about long videos.")
    parser.add_argument("--version", action="version", version=f"crosslmm_jax {crosslmm_jax.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="the whole path on a CPU: make videos, train, evaluate, ask")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="default: runs/demo")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--quick", action="store_true", help="few steps: shows that it runs, learns little")
    demo.set_defaults(run=_demo)

    params = commands.add_parser("params", help="parameters by part and by stage, without allocating them")
    params.add_argument("--preset", required=True, metavar="NAME", help="e.g. crosslmm_2b")
    params.add_argument("--json", metavar="-|PATH", help="write JSON to a file, or - for only JSON on stdout")
    params.set_defaults(run=_params)

    train = commands.add_parser(
        "train", help="train one stage; the same command resumes",
        epilog="Any field can be overridden after the file: --stage.learning-rate 1e-4 --data.shuffle False",
    )  # fmt: skip
    train.add_argument("config", metavar="CONFIG.py", help="a file of configs/")
    train.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--field value ...")
    train.set_defaults(run=_train)

    ask = commands.add_parser("ask", help="ask one question about a video")
    _add_generation_options(ask)
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--json", metavar="-|PATH", help="write JSON to a file, or - for only JSON on stdout")
    ask.add_argument("--attention", metavar="PNG", help="draw where the answer looked")
    ask.set_defaults(run=_ask)

    chat = commands.add_parser("chat", help="encode a video once, then ask as often as you like")
    _add_generation_options(chat)
    chat.set_defaults(run=_chat)
    return parser


def _take_debug(words: list[str]) -> bool:
    """Removes `--debug` wherever it stands before `--`: `train` would take it for an override."""
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words[:end] = [word for word in words[:end] if word != "--debug"]
    return debug


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(words)
    try:
        args = build_parser().parse_args(words)
        args.run(args)
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"crosslmm: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt as stop:
        if debug:
            traceback.print_exc()
        if str(stop):  # training says what it saved
            print(f"crosslmm: {stop}", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
