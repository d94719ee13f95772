"""`crosslmm data`: index a mixture, look at an index, pack media into records."""

import argparse
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable

from crosslmm_jax.cli.options import Commands, Renamed, add_field_options, seed
from crosslmm_jax.config import DataConfig, leaf_fields
from crosslmm_jax.config_io import apply_overrides
from crosslmm_jax.errors import Fault, list_counts
from crosslmm_jax.utils import check_local

FAILURES = 1  # exit code of `check` when a row cannot be read
# What decides how rows become batches.
_STATS_FIELDS = (
    "batch_size", "text_buckets", "frame_buckets", "max_shapes", "max_text_tokens", "style",
    "time_instruction", "sampling.", "modality_weights.",
)  # fmt: skip
_CHECK_FIELDS = ("sampling.", "deadline_s", "max_damaged")


def add_data(commands: Commands) -> None:
    """Adds `data` to the commands of `crosslmm`."""
    data = commands.add_parser("data", help="index training data, look at an index, pack media into records")
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    index = actions.add_parser(
        "index", help="probe the media of a mixture once; continues where it stopped",
        epilog="MIXTURE lists data sets, `datasets: [{json_path: a.json, data_root: videos}]`; see"
        " configs/*_mixture.yaml, and crosslmm_jax/data/annotations/mixture.py for all keys. Rows that cannot"
        " be used are listed in INDEX/bad.jsonl. A second call probes only what changed.",
    )  # fmt: skip
    index.add_argument("--out", required=True, metavar="INDEX", help="folder to write")
    index.add_argument(
        "--decode-up-to", type=_count_or_all, default=argparse.SUPPRESS, metavar="N|all",
        help="count the damaged frames of videos of up to so many frames, by decoding them; of longer ones a"
        " few places are decoded, and with 0 nothing is; default: 1000",
    )  # fmt: skip
    index.add_argument(
        "--max-damaged", type=_share, default=DataConfig.max_damaged, metavar="SHARE",
        help="refuse videos with a larger share of damaged frames; train with the same --data.max-damaged;"
        f" default: {DataConfig.max_damaged}",
    )  # fmt: skip
    index.add_argument(
        "--tokenizer", metavar="DIR",
        help="counts tokens: MODEL, or a folder with tokenizer.json, the same as in training (default: the"
        " small tokenizer of the tiny model)",
    )  # fmt: skip
    index.add_argument(
        "--shard", metavar="K/N",
        help="make part K (from 0) of N of the index, each on a machine of its own; then `data merge` them",
    )  # fmt: skip
    merge = actions.add_parser(
        "merge", help="merge the shards of an index that several machines made",
        epilog="The merged index is the one that a single machine makes, byte for byte. The shards, folders"
        " beside INDEX, are deleted.",
    )  # fmt: skip
    merge.add_argument("index", metavar="INDEX", help="the --out of `crosslmm data index --shard K/N`")
    pack = actions.add_parser(
        "to-tfds", help="write a mixture with its media as ArrayRecord files, for fast random access",
        epilog="`tfds.builder_from_directory(DIR).as_data_source('train')` opens DIR without tensorflow, and"
        " a mixture may name DIR as a path. Media are kept byte for byte; a folder of frames stays one video."
        " Rows that cannot be used are listed in DIR/bad.jsonl. The same command continues after a stop.",
    )  # fmt: skip
    pack.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    sizes = pack.add_mutually_exclusive_group()
    sizes.add_argument("--shards", type=int, metavar="N", help="most files to write (default: by size)")
    sizes.add_argument("--shard-mb", type=float, default=512, metavar="MB", help="per file; default: 512")
    for parser in (index, pack):
        parser.add_argument("mixture", metavar="MIXTURE", help="a YAML mixture, or one annotation file")
        parser.add_argument("--media-root", metavar="DIR", help="of media, where no data_root is named")
        parser.add_argument(
            "--path-map", metavar="MAP", help="YAML: `beginning of a path or address: local folder` per line"
        )
    stats = actions.add_parser("stats", help="rows, durations, frames, tokens, buckets and padding")
    stats.add_argument("--tokens-per-frame", type=int, default=9, metavar="N", help="default: 9")
    check = actions.add_parser(
        "check", help="decode an index, or a sample of it, and list what fails",
        epilog="Exit code 1 when a row fails.",
    )  # fmt: skip
    check.add_argument("--sample", type=_natural, metavar="N", help="rows, drawn at random (default: all)")
    for parser in (index, pack, check):
        parser.add_argument(
            "--workers", type=_natural, default=os.cpu_count() or 1, metavar="N", help="processes"
        )
        parser.add_argument("--seed", type=seed, default=0, help="of what is drawn at random; default: 0")
        parser.add_argument("--allow-outside", action="store_true", help="media paths may leave their root")
    for parser, fields in ((stats, _STATS_FIELDS), (check, _CHECK_FIELDS)):
        parser.add_argument("index", metavar="INDEX", help="folder that `crosslmm data index` wrote")
        add_field_options(parser, DataConfig, [n for n in leaf_fields(DataConfig) if n.startswith(fields)])
        for name in ("policy", "frames", "fps"):
            parser.add_argument(f"--{name}", action=Renamed, const=f"--sampling.{name}")
    actions_of: dict[argparse.ArgumentParser, Callable[[argparse.Namespace], int | None]]
    actions_of = {index: _index, merge: _merge, pack: _to_tfds, stats: _stats, check: _check}
    for parser, run in actions_of.items():
        parser.set_defaults(run=run)


def _natural(text: str) -> int:
    """Parses an argument that is a count."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _count_or_all(text: str) -> int | None:
    """Parses a count, or "all" as None."""
    return None if text == "all" else _natural(text)


def _share(text: str) -> float:
    """Parses a share of a whole."""
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0..1")
    return share


def _index(args: argparse.Namespace) -> None:
    from crosslmm_jax.data.index import build_index, parse_shard

    check_local(args.out)
    shard = None if args.shard is None else parse_shard(args.shard)
    given = {"decode_up_to": args.decode_up_to} if hasattr(args, "decode_up_to") else {}
    with tempfile.TemporaryDirectory() as folder:
        if args.tokenizer is None:
            from crosslmm_jax.demo import write_default_tokenizer

            write_default_tokenizer(folder)
        report = build_index(
            args.mixture, args.out, tokenizer=args.tokenizer or folder, media_root=args.media_root,
            path_map=args.path_map, workers=args.workers, seed=args.seed, allow_outside=args.allow_outside,
            shard=shard, max_damaged=args.max_damaged, **given,
        )  # fmt: skip
    index = shlex.quote(args.out)
    if shard is None:
        further = f"crosslmm data stats {index}, or train with --data.index {index}"
        end = f"written: {args.out}; next: {further}"
    else:
        end = f"written: shard {args.shard}; once all are: crosslmm data merge {index}"
    print("\n".join([*report.lines(), end]))
    if args.tokenizer is None:
        print(
            "tokens are counted by the small tokenizer of the tiny model; to train another one, repeat with"
            " --tokenizer DIR: no file is probed again"
        )


def _merge(args: argparse.Namespace) -> None:
    from crosslmm_jax.data.index import merge_index

    print("\n".join([*merge_index(args.index).lines(), f"written: {args.index}"]))


def _to_tfds(args: argparse.Namespace) -> None:
    from crosslmm_jax.data.tfds_export import to_tfds

    check_local(args.out)
    report = to_tfds(
        args.mixture, args.out, media_root=args.media_root, path_map=args.path_map, shards=args.shards,
        shard_mb=args.shard_mb, workers=args.workers, seed=args.seed, allow_outside=args.allow_outside,
    )  # fmt: skip
    print("\n".join([*report.lines(), f"written: {args.out}"]))


def _stats(args: argparse.Namespace) -> None:
    from crosslmm_jax.data.reports import describe

    config = DataConfig(index=args.index, tokenizer="", batch_size=128)
    config = apply_overrides(config, args.overrides, source="data stats")
    print("\n".join(describe(config, tokens_per_frame=args.tokens_per_frame)))


def _check(args: argparse.Namespace) -> int:
    from crosslmm_jax.data.reports import Damaged, check_index

    config = DataConfig(index=args.index, tokenizer="", batch_size=1)
    config = apply_overrides(config, args.overrides, source="data check")
    damaged: list[Damaged] = []
    count, faults = check_index(
        args.index, sampling=config.sampling, sample=args.sample, workers=args.workers, seed=args.seed,
        allow_outside=args.allow_outside, deadline_s=config.deadline_s, on_bad_row=_print_fault,
        max_damaged=config.max_damaged, on_damaged=damaged.append,
    )  # fmt: skip
    for video in damaged:
        print(f"damaged\t{video.path}: {video.damaged} of {video.frames} frames are damaged")
    reasons = ", ".join(list_counts(Counter(fault.reason for fault in faults)))
    bad = f"{len(faults)} bad{f' ({reasons})' if faults else ''}"
    print(f"{count} rows decoded, {bad}, videos with damaged frames: {len(damaged)}")
    return FAILURES if faults else 0


def _print_fault(fault: Fault) -> None:
    print(f"row {fault.row}\t{fault.reason}\t{fault}", flush=True)
