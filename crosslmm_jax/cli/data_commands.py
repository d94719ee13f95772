"""What `crosslmm data ...` does."""

import tempfile
from collections import Counter

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.index import build_index
from crosslmm_jax.data.reports import check_index, describe
from crosslmm_jax.data.tfds_export import to_tfds
from crosslmm_jax.demo import write_default_tokenizer
from crosslmm_jax.errors import Fault, list_counts

FAILURES = 1  # exit code of `check` when a row cannot be read


def index(
    mixture: str, *, out: str, tokenizer: str | None, media_root: str | None, workers: int, seed: int,
    allow_outside: bool,
) -> None:  # fmt: skip
    """Indexes a mixture and says what was found; without a tokenizer, with the one of the tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is None:
            write_default_tokenizer(folder)
        report = build_index(
            mixture, out, tokenizer=tokenizer or folder, media_root=media_root, workers=workers, seed=seed,
            allow_outside=allow_outside,
        )  # fmt: skip
    print("\n".join([*report.lines(), f"written: {out}"]))
    if tokenizer is None:
        print(
            "tokens are counted by the small tokenizer of the tiny model; to train another one, repeat with"
            " --tokenizer DIR: nothing is probed again"
        )


def write_tfds(
    mixture: str, *, out: str, media_root: str | None, shards: int | None, shard_mb: float, workers: int,
    seed: int, allow_outside: bool,
) -> None:  # fmt: skip
    """Writes a mixture as a data set of TensorFlow Datasets and says what is in it."""
    report = to_tfds(
        mixture, out, media_root=media_root, shards=shards, shard_mb=shard_mb, workers=workers, seed=seed,
        allow_outside=allow_outside,
    )  # fmt: skip
    print("\n".join([*report.lines(), f"written: {out}"]))


def stats(config: DataConfig, *, tokens_per_frame: int) -> None:
    """Prints what the index of a config holds, and how its rows would be batched."""
    print("\n".join(describe(config, tokens_per_frame=tokens_per_frame)))


def check(
    folder: str, *, sampling: SamplingConfig, sample: int | None, workers: int, seed: int,
    allow_outside: bool, deadline_s: float | None,
) -> int:  # fmt: skip
    """Decodes an index and prints what fails as it is found, one row a line."""
    count, bad = check_index(
        folder, sampling=sampling, sample=sample, workers=workers, seed=seed, allow_outside=allow_outside,
        deadline_s=deadline_s, on_bad_row=_print_row,
    )  # fmt: skip
    reasons = ", ".join(list_counts(Counter(fault.reason for fault in bad)))
    print(f"{count} rows decoded, {len(bad)} bad{f' ({reasons})' if bad else ''}")
    return FAILURES if bad else 0


def _print_row(fault: Fault) -> None:
    print(f"row {fault.row}\t{fault.reason}\t{fault}", flush=True)
