"""`crosslmm convert`: Hugging Face weights in and out."""

import argparse
from collections.abc import Mapping, Sequence

from crosslmm_jax.cli.options import (
    Commands,
    add_field_options,
    add_json_option,
    next_commands,
    seed,
    write_json,
)
from crosslmm_jax.config import ModelConfig, names_with_role

DIFFERENT = 1  # exit code of `verify` when the models disagree, as diff uses


def add_convert(commands: Commands) -> None:
    """Adds `convert` to the commands of `crosslmm`."""
    convert = commands.add_parser("convert", help="Hugging Face weights in and out, exactly")
    directions = convert.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parsers = _add_from_hf(directions), _add_to_hf(directions)
    _add_verify(directions)
    for parser in parsers:
        parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16; default: as is")
        add_json_option(parser)


def _add_from_hf(commands: Commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "from-hf", help="SigLIP and Qwen2, LLaVA-OneVision / LLaVA-Video, or an export, to a MODEL folder"
    )  # fmt: skip
    parser.add_argument(
        "--vision", metavar="DIR",
        help="SigLIP or SigLIP2 folder, or big_vision's .npz; with --llava: its sizes, and its weights if"
        " --llava has no tower",
    )  # fmt: skip
    parser.add_argument("--llm", metavar="DIR", help="Qwen2 or Qwen2.5 folder")
    parser.add_argument("--llava", metavar="DIR", help="LLaVA-OneVision or LLaVA-Video folder, any layout")
    parser.add_argument(
        "--projector", metavar="FILE",
        help="mm_projector.bin; without it: LLaVA's own with --llava, else random",
    )  # fmt: skip
    parser.add_argument("--crosslmm", metavar="DIR", help="folder that `to-hf` wrote: restores its MODEL")
    parser.add_argument("--preset", metavar="NAME", help="sizes are checked against it, e.g. crosslmm_2b")
    parser.add_argument("--out", required=True, metavar="MODEL", help="folder to write")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: the language model's folder")
    parser.add_argument("--seed", type=seed, default=0, help="of parameters that no source has; default: 0")
    # The source states the architecture and the positions.
    of_source = ("decoder.max_positions", "decoder.yarn_factor", "decoder.yarn_trained_positions")
    names = names_with_role(ModelConfig, "identity", "recipe", "performance")
    add_field_options(parser, ModelConfig, [name for name in names if name not in of_source])
    parser.set_defaults(run=_from_hf)
    return parser


def _add_to_hf(commands: Commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("to-hf", help="a MODEL folder to safetensors that torch users load")
    parser.add_argument("model", metavar="MODEL", help="folder that `crosslmm` wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets vision/, llm/ and crosslmm/")
    parser.add_argument(
        "--torch-reference", action="store_true", help="also write a PyTorch module that runs the export"
    )
    parser.set_defaults(run=_to_hf)
    return parser


def _add_verify(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify", help="a MODEL folder against its source in torch, block by block; needs torch",
        epilog="Exit code 1 and the name of the first block when an output differs by more than --tolerance"
        " (times the root mean square of the source's output, where that is above 1).",
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="folder that `crosslmm convert from-hf` wrote")
    parser.add_argument("--vision", metavar="DIR", help="the SigLIP folder it was made from")
    parser.add_argument("--llm", metavar="DIR", help="the Qwen2 folder it was made from")
    parser.add_argument("--llava", metavar="DIR", help="or the LLaVA folder it was made from, any layout")
    parser.add_argument("--projector", metavar="FILE", help="mm_projector.bin, if it was made from one")
    parser.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="default: 1e-4")
    parser.add_argument("--seed", type=seed, default=0, help="of the random frames and tokens; default: 0")
    add_json_option(parser)
    parser.set_defaults(run=_verify)


def _from_hf(args: argparse.Namespace) -> None:
    from crosslmm_jax.convert import Request, convert_from_hf

    request = Request(
        vision=args.vision, llm=args.llm, llava=args.llava, projector=args.projector,
        crosslmm=args.crosslmm, preset=args.preset, overrides=args.overrides, dtype=args.dtype,
        seed=args.seed,
    )  # fmt: skip
    report = convert_from_hf(request, args.out, tokenizer=args.tokenizer)
    _print_report(
        args, [*report.lines(), f"written: {args.out}; {next_commands(args.out)}"], report.as_dict()
    )


def _to_hf(args: argparse.Namespace) -> None:
    from crosslmm_jax.convert import convert_to_hf

    report = convert_to_hf(args.model, args.out, dtype=args.dtype, torch_reference=args.torch_reference)
    _print_report(args, [*report.lines(), f"written: {args.out}"], report.as_dict())


def _verify(args: argparse.Namespace) -> int:
    from crosslmm_jax.convert import verify

    result = verify(
        args.model, vision=args.vision, llm=args.llm, llava=args.llava, projector=args.projector,
        tolerance=args.tolerance, seed=args.seed,
    )  # fmt: skip
    _print_report(args, result.lines(), result.as_dict())
    return 0 if result.diverging is None else DIFFERENT


def _print_report(args: argparse.Namespace, lines: Sequence[str], payload: Mapping[str, object]) -> None:
    if args.json != "-":
        print("\n".join(lines))
    if args.json is not None:
        write_json(args.json, payload)
