"""The `crosslmm` command: parses, then imports the one room that does the work.

Nothing heavy is imported here, so that `crosslmm --help` answers at once. A user's mistake ends as one
line on stderr and exit code 2; `--debug` shows where it was found.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import crosslmm_jax
from crosslmm_jax.cli.data import add_data_commands
from crosslmm_jax.config import Precision
from crosslmm_jax.errors import UserError
from crosslmm_jax.parallel import xla_flags

USER_MISTAKE = 2  # exit code, as argparse uses
DIFFERENT = 1  # exit code of `convert verify` when the models disagree, as diff uses
INTERRUPTED = 130  # exit code, 128 + SIGINT, as shells use
# What a conversion may choose: all that weights do not settle.
MODEL_FIELDS = (
    "merge.grid", "merge.pooling", "merge.projector-input-norm", "cross-attention.cross-attn-every",
    "cross-attention.cross-attn-offset", "cross-attention.directions", "cross-attention.kv-source",
    "cross-attention.cross-attn-init", "cross-attention.gate-init", "cross-attention.v2v-scope",
    "cross-attention.v2v-window", "cross-attention.cross-attn-rope", "cross-attention.cache-dtype",
    "vision.feature-layer", "vision.post-layernorm", "vision.frame-chunk", "vision.keep-features",
    "decoder.vocab-size", "decoder.remat", "compute-dtype", "visual-matmul", "attention",
)  # fmt: skip


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
    from crosslmm_jax.train import train

    train(config)


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


def _convert_from_hf(args: argparse.Namespace) -> None:
    from crosslmm_jax.convert import Request, convert_from_hf

    words = []
    for field in MODEL_FIELDS:
        values = getattr(args, field)
        words += [f"--{field}", *values] if values is not None else []
    request = Request(
        vision=args.vision, llm=args.llm, llava=args.llava, projector=args.projector,
        crosslmm=args.crosslmm, preset=args.preset, overrides=words, dtype=args.dtype, seed=args.seed,
    )  # fmt: skip
    report = convert_from_hf(request, args.out, tokenizer=args.tokenizer)
    _tell(args, report)


def _convert_to_hf(args: argparse.Namespace) -> None:
    from crosslmm_jax.convert import convert_to_hf

    _tell(args, convert_to_hf(args.model, args.out, dtype=args.dtype, torch_reference=args.torch_reference))


def _convert_verify(args: argparse.Namespace) -> int:
    from crosslmm_jax.convert import verify

    result = verify(
        args.model, vision=args.vision, llm=args.llm, llava=args.llava, projector=args.projector,
        tolerance=args.tolerance, seed=args.seed,
    )  # fmt: skip
    if args.json != "-":
        print("\n".join(result.lines()))
    if args.json is not None:
        _write_json(args.json, result.as_dict())
    return 0 if result.diverging is None else DIFFERENT


def _tell(args: argparse.Namespace, report: Any) -> None:
    if args.json != "-":
        print("\n".join([*report.lines(), f"written: {args.out}"]))
    if args.json is not None:
        _write_json(args.json, report.as_dict())


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
    parser.add_argument(
        "--precision", choices=get_args(Precision),
        help="of encoder, projector and the video's cache (default: the model's own)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1, no cut")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, when the temperature is above 0")


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser("convert", help="Hugging Face weights in and out, exactly")
    directions = convert.add_subparsers(title="commands", metavar="COMMAND", required=True)
    come = directions.add_parser(
        "from-hf", help="SigLIP and Qwen2, LLaVA-OneVision / LLaVA-Video, or an export, to a MODEL folder"
    )  # fmt: skip
    come.add_argument(
        "--vision",
        metavar="DIR",
        help="SigLIP or SigLIP2 folder, or big_vision's .npz; with --llava: sizes",
    )
    come.add_argument("--llm", metavar="DIR", help="Qwen2 or Qwen2.5 folder")
    come.add_argument("--llava", metavar="DIR", help="LLaVA-OneVision or LLaVA-Video folder, any layout")
    come.add_argument("--projector", metavar="FILE", help="mm_projector.bin; without one it starts fresh")
    come.add_argument("--crosslmm", metavar="DIR", help="what `to-hf` wrote: gives back its MODEL")
    come.add_argument("--preset", metavar="NAME", help="sizes are checked against it, e.g. crosslmm_2b")
    come.add_argument("--out", required=True, metavar="MODEL", help="folder to write")
    come.add_argument("--tokenizer", metavar="DIR", help="default: the language model's folder")
    come.add_argument("--seed", type=int, default=0, help="of parameters that no source fills; default: 0")
    fields = come.add_argument_group("fields of the model that weights do not settle")
    for field in MODEL_FIELDS:
        fields.add_argument(f"--{field}", dest=field, nargs="+", metavar="VALUE")
    come.set_defaults(run=_convert_from_hf)
    go = directions.add_parser("to-hf", help="a MODEL folder to safetensors that torch users load")
    go.add_argument("model", metavar="MODEL", help="folder that `crosslmm` wrote")
    go.add_argument("--out", required=True, metavar="DIR", help="gets vision/, llm/ and crosslmm/")
    go.add_argument(
        "--torch-reference", action="store_true", help="also write a PyTorch module that runs the export"
    )
    go.set_defaults(run=_convert_to_hf)
    _add_convert_verify(directions)
    for parser in (come, go):
        parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; default: as is")
        parser.add_argument("--json", metavar="-|PATH", help="the report as JSON; - for only JSON on stdout")


def _add_convert_verify(directions: Any) -> None:
    check = directions.add_parser(
        "verify", help="a MODEL folder against its source in torch, block by block; needs torch",
        epilog="Exit code 1 and the name of the first block when an output differs by more than --tolerance"
        " (times the root mean square of the source's output, where that is above 1).",
    )  # fmt: skip
    check.add_argument("model", metavar="MODEL", help="folder that `crosslmm convert from-hf` wrote")
    check.add_argument("--vision", metavar="DIR", help="the SigLIP folder it was made from")
    check.add_argument("--llm", metavar="DIR", help="the Qwen2 folder it was made from")
    check.add_argument("--llava", metavar="DIR", help="or the LLaVA folder it was made from, any layout")
    check.add_argument("--projector", metavar="FILE", help="mm_projector.bin, if it was made from one")
    check.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="default: 1e-4")
    check.add_argument("--seed", type=int, default=0, help="of the random frames and tokens; default: 0")
    check.add_argument("--json", metavar="-|PATH", help="the table as JSON; - for only JSON on stdout")
    check.set_defaults(run=_convert_verify)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every subcommand; `args.run` is the function to call."""
    from crosslmm_jax.cli.profile import add_profile

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

    add_data_commands(commands)
    _add_convert(commands)
    add_profile(commands)

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
        xla_flags.apply(os.environ)  # before a room imports jax, which reads them once
        return args.run(args) or 0
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
