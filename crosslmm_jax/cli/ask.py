"""`crosslmm ask` and `crosslmm chat`."""

import argparse
from typing import get_args

from crosslmm_jax.cli.options import Commands, add_json_option
from crosslmm_jax.config import Precision
from crosslmm_jax.errors import UserError


def add_ask_and_chat(commands: Commands) -> None:
    """Adds `ask` and `chat` to the commands of `crosslmm`."""
    ask = commands.add_parser("ask", help="ask one question about a video")
    _add_generation_options(ask)
    ask.add_argument("question", metavar="QUESTION")
    add_json_option(ask)
    ask.add_argument("--attention", metavar="PNG", help="draw the frames and patches that the answer read")
    ask.set_defaults(run=_ask)
    chat = commands.add_parser("chat", help="encode a video once, then ask as often as you like")
    _add_generation_options(chat)
    chat.set_defaults(run=_chat)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder that `crosslmm train` or `crosslmm demo` wrote"
    )
    parser.add_argument("video", metavar="VIDEO", help="a video file")
    parser.add_argument("--frames", type=int, metavar="N", help="frames to read (default: as in training)")
    parser.add_argument(
        "--precision", choices=get_args(Precision),
        help="of encoder, projector and video KV cache (default: as MODEL says)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, all tokens")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, when the temperature is above 0")


def _ask(args: argparse.Namespace) -> None:
    if not args.question.strip():
        raise UserError('the question is empty; write one, e.g. "What is the man doing?"')
    from crosslmm_jax.inference import ask

    ask(
        args.model, args.video, args.question, frames=args.frames, precision=args.precision,
        json_path=args.json, attention_path=args.attention, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip


def _chat(args: argparse.Namespace) -> None:
    from crosslmm_jax.inference import chat

    chat(
        args.model, args.video, frames=args.frames, precision=args.precision,
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
    )  # fmt: skip
