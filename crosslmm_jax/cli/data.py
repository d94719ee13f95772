"""The command line of `crosslmm data ...`: parses, and imports what it needs only then."""

import argparse
import os
from typing import Any


def add_data_commands(commands: Any) -> None:
    """Adds `data` to the subparsers of `crosslmm`."""
    data = commands.add_parser("data", help="index training data, look at an index, pack media in records")
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    index = actions.add_parser(
        "index", help="probe the media of a mixture once; goes on where it stopped",
        epilog="MIXTURE lists data sets, `datasets: [{json_path: a.json, data_root: videos}]`; see"
        " configs/*_mixture.yaml, and crosslmm_jax/data/annotations/mixture.py for all keys. Rows that cannot"
        " be used are in INDEX/bad.jsonl. Repeated, only what changed is probed.",
    )  # fmt: skip
    index.add_argument("--out", required=True, metavar="INDEX", help="folder to write")
    index.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="counts tokens: MODEL, or a folder of tokenizer.json, and must be training's (default: the small"
        " one of the tiny model)",
    )
    index.set_defaults(run=_data_index)
    pack = actions.add_parser(
        "to-tfds", help="write a mixture with its media as ArrayRecord files, for fast random access",
        epilog="`tfds.builder_from_directory(DIR).as_data_source('train')` opens DIR without tensorflow, and"
        " DIR can stand in a mixture as a path. Media are kept byte for byte; a folder of frames stays one"
        " video. Rows that cannot be used are in DIR/bad.jsonl. After a stop, the same command goes on.",
    )  # fmt: skip
    pack.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    sizes = pack.add_mutually_exclusive_group()
    sizes.add_argument("--shards", type=int, metavar="N", help="files to write, at most (default: by size)")
    sizes.add_argument("--shard-mb", type=float, default=512, metavar="MB", help="of a file; default: 512")
    pack.set_defaults(run=_data_to_tfds)
    for parser in (index, pack):
        parser.add_argument("mixture", metavar="MIXTURE", help="a YAML mixture, or one file of annotations")
        parser.add_argument("--media-root", metavar="DIR", help="of media, where no data_root is named")
        parser.add_argument(
            "--workers", type=_natural, default=os.cpu_count() or 1, metavar="N", help="processes"
        )
        parser.add_argument("--seed", type=int, default=0, help="of the mixture's random strategies")
        parser.add_argument("--allow-outside", action="store_true", help="media paths may leave their root")
    stats = actions.add_parser("stats", help="rows, durations, frames, tokens, buckets and padding")
    stats.add_argument("index", metavar="INDEX")
    stats.add_argument("--batch-size", type=int, default=128, metavar="N", help="default: 128")
    stats.add_argument("--max-shapes", type=int, default=16, metavar="N", help="buckets; default: 16")
    stats.add_argument("--tokens-per-frame", type=int, default=9, metavar="N", help="default: 9")
    stats.add_argument("--max-text-tokens", type=int, default=2048, metavar="N", help="default: 2048")
    stats.add_argument("--style", choices=("chat", "plain"), default="chat")
    stats.add_argument("--time-instruction", choices=("none", "short", "full"), default="none")
    stats.set_defaults(run=_data_stats)
    check = actions.add_parser(
        "check", help="decode an index, or a sample of it, and list what fails",
        epilog="Ends with code 1 when a row fails.",
    )  # fmt: skip
    check.add_argument("index", metavar="INDEX")
    check.add_argument("--sample", type=_natural, metavar="N", help="rows, drawn at random (default: all)")
    check.add_argument("--workers", type=_natural, default=os.cpu_count() or 1, metavar="N", help="processes")
    check.add_argument("--seed", type=int, default=0, help="of the sample")
    check.add_argument("--allow-outside", action="store_true", help="as the index was told")
    check.add_argument(
        "--deadline-s", type=_seconds, metavar="X", help="as training's deadline_s (default: its default)"
    )
    check.set_defaults(run=_data_check)
    for parser in (stats, check):
        parser.add_argument(
            "--policy", choices=("uniform", "fps", "llava", "dynamic_fps1"), default="uniform"
        )
        parser.add_argument("--frames", type=int, default=32, metavar="N", help="default: 32")
        parser.add_argument("--fps", type=float, default=1.0, metavar="X", help="default: 1")


def _natural(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def _seconds(text: str) -> float:
    """An argument that is a time to wait."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds greater than 0")
    return seconds


def _sampling(args: argparse.Namespace) -> Any:
    from crosslmm_jax.config import SamplingConfig

    return SamplingConfig(policy=args.policy, frames=args.frames, fps=args.fps)


def _data_index(args: argparse.Namespace) -> None:
    from crosslmm_jax.cli import data_commands as commands

    commands.index(
        args.mixture, out=args.out, tokenizer=args.tokenizer, media_root=args.media_root,
        workers=args.workers, seed=args.seed, allow_outside=args.allow_outside,
    )  # fmt: skip


def _data_to_tfds(args: argparse.Namespace) -> None:
    from crosslmm_jax.cli import data_commands as commands

    commands.write_tfds(
        args.mixture, out=args.out, media_root=args.media_root, shards=args.shards, shard_mb=args.shard_mb,
        workers=args.workers, seed=args.seed, allow_outside=args.allow_outside,
    )  # fmt: skip


def _data_stats(args: argparse.Namespace) -> None:
    from crosslmm_jax.cli import data_commands as commands
    from crosslmm_jax.config import DataConfig

    config = DataConfig(
        index=args.index, tokenizer="", batch_size=args.batch_size, max_shapes=args.max_shapes,
        max_text_tokens=args.max_text_tokens, style=args.style, time_instruction=args.time_instruction,
        sampling=_sampling(args),
    )  # fmt: skip
    commands.stats(config, tokens_per_frame=args.tokens_per_frame)


def _data_check(args: argparse.Namespace) -> int:
    from crosslmm_jax.cli import data_commands as commands
    from crosslmm_jax.config import DataConfig

    deadline_s = DataConfig.deadline_s if args.deadline_s is None else args.deadline_s
    return commands.check(
        args.index, sampling=_sampling(args), sample=args.sample, workers=args.workers, seed=args.seed,
        allow_outside=args.allow_outside, deadline_s=deadline_s,
    )  # fmt: skip
