"""Schedules the rows of an index as global batches, without opening a media file.

token_counts   frames and text tokens of each row
kinds          rows of one modality and size, counted
buckets        the static shapes of batches, and the bucket of each row
none_fits      why no row fits the settings
bucket_search  the search for shapes with little padding
schedule       the rows of every step
held_out       rows that are not trained on
"""

from crosslmm_jax.data.batching.buckets import (
    FRAME_COST,
    NO_BUCKET,
    Bucket,
    BucketedRows,
    bucket_rows,
    row_cost,
)
from crosslmm_jax.data.batching.held_out import held_out_batches, hold_out
from crosslmm_jax.data.batching.schedule import Schedule, ScheduledBatch, deal_evenly, group_rows

__all__ = [
    "Bucket", "FRAME_COST", "NO_BUCKET", "Schedule", "ScheduledBatch", "BucketedRows",
    "bucket_rows", "deal_evenly", "group_rows", "held_out_batches", "hold_out", "row_cost",
]  # fmt: skip
