"""Turns rows into the batches that training reads.

example  one row: media decoded, turns tokenised; a row with a damaged video is replaced here
collate  examples to one batch of a static shape
dataset  the rows of a config, their buckets and schedule
held_out rows that are not trained on
loader   the iterator over the batches of one host, with worker processes
"""

from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.held_out import HeldOutRows, open_held_out
from crosslmm_jax.data.loading.loader import BatchIterator

__all__ = [
    "BatchIterator",
    "Dataset",
    "HeldOutRows",
    "open_held_out",
]
