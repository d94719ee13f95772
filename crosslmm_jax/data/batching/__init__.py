"""TODO."""

from crosslmm_jax.data.batching.buckets import (
    FRAME_COST,
    NO_BUCKET,
    Bucket,
    BucketedRows,
    bucket_rows,
    row_cost,
)
from crosslmm_jax.data.batching.schedule import Schedule, ScheduledBatch, WeightedRows, deal_evenly

__all__ = [
    "Bucket",
    "FRAME_COST",
    "NO_BUCKET",
    "WeightedRows",
    "Schedule",
    "ScheduledBatch",
    "BucketedRows",
    "deal_evenly",
    "bucket_rows",
    "row_cost",
]
