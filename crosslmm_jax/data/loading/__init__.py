"""TODO."""

from crosslmm_jax.data.loading.collate import lay_out
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.loader import BatchIterator, make_iterator

__all__ = [
    "BatchIterator",
    "Dataset",
    "lay_out",
    "make_iterator",
]
