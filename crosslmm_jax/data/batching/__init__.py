"""TODO."""

from crosslmm_jax.data.batching.buckets import FRAME_COST, LEFT_OUT, Bucket, row_cost
from crosslmm_jax.data.batching.choose_buckets import Shapes, make_shapes
from crosslmm_jax.data.batching.schedule import Members, Plan, PlannedBatch, deal_evenly

__all__ = [
    "Bucket",
    "FRAME_COST",
    "LEFT_OUT",
    "Members",
    "Plan",
    "PlannedBatch",
    "Shapes",
    "deal_evenly",
    "make_shapes",
    "row_cost",
]
