"""TODO."""

from crosslmm_jax.utils.atomic_folder import cannot_write, put, working_folder
from crosslmm_jax.utils.progress import RowProgress
from crosslmm_jax.utils.workers import end_with_parent, worker_pool

__all__ = [
    "RowProgress",
    "cannot_write",
    "end_with_parent",
    "put",
    "worker_pool",
    "working_folder",
]
