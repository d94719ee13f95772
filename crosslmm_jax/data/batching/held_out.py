"""Rows that are not trained on: which they are, and their batches, always the same and in the same order."""

from collections.abc import Sequence

import numpy as np

from crosslmm_jax.data.batching.buckets import Bucket
from crosslmm_jax.data.batching.schedule import ScheduledBatch, WeightedRows


def uniform(rows: np.ndarray) -> np.ndarray:
    """float64[n] in [0, 1), a random number for each row number: the same in every run and for any seed."""
    # splitmix64, of which neighbouring numbers give numbers that look independent.
    mixed = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53


def hold_out(
    rows: Sequence[Sequence[WeightedRows]], share: float
) -> tuple[list[list[WeightedRows]], list[np.ndarray]]:
    """Divides the rows of each bucket into those that are trained on and those that are held out.

    A bucket that would have no row left keeps all of them.

    Args:
      rows: of each bucket, by weight.
      share: share of the rows that is held out, within 0..1.

    Returns:
      trained: the rows that are left, in the form of `rows`.
      held_out: int64[n] of each bucket.
    """
    if not share:
        return [list(parts) for parts in rows], [np.empty(0, np.int64) for _ in rows]
    trained, held_out = [], []
    for parts in rows:
        is_held = [uniform(part.rows) < share for part in parts]
        if all(held.all() for held in is_held):
            is_held = [np.zeros(len(part.rows), bool) for part in parts]
        left = [WeightedRows(p.rows[~held], p.weight) for p, held in zip(parts, is_held, strict=True)]
        trained.append([part for part in left if len(part.rows)])
        held_rows = [p.rows[held] for p, held in zip(parts, is_held, strict=True)]
        held_out.append(np.concatenate([np.empty(0, np.int64), *held_rows]).astype(np.int64))
    return trained, held_out


def held_out_batches(
    buckets: Sequence[Bucket], rows: Sequence[np.ndarray], *, batch_size: int, most_rows: int
) -> list[ScheduledBatch]:
    """The batches of held-out rows, bucket after bucket. The last of a bucket may have fewer rows.

    Args:
      buckets: shapes of the batches.
      rows: row numbers of each bucket.
      batch_size: B, rows of a full batch.
      most_rows: of more rows, a random choice is read.
    """
    chosen = np.concatenate([np.empty(0, np.int64), *rows])
    if len(chosen) > most_rows:
        # Other bits than those that chose the held-out rows, which are all small.
        order = np.argsort(uniform(chosen + 2**40), kind="stable")
        chosen = chosen[order[:most_rows]]
    batches = []
    for number, (bucket, of_bucket) in enumerate(zip(buckets, rows, strict=True)):
        left = np.sort(of_bucket[np.isin(of_bucket, chosen)])
        for begin in range(0, len(left), batch_size):
            batches.append(ScheduledBatch(number, bucket, left[begin : begin + batch_size]))
    return batches
