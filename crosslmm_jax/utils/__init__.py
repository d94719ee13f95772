"""Helpers without project knowledge: atomic folders, progress, worker processes.

atomic_folder    files and folders that are complete or absent
progress         progress of a long task, on a terminal or in a log
workers          worker processes that end with their parent
"""

from crosslmm_jax.utils.atomic_folder import atomic_folder, atomic_write, cannot_write, is_vacant
from crosslmm_jax.utils.progress import Progress
from crosslmm_jax.utils.workers import end_with_parent, map_in_order

__all__ = [
    "Progress", "atomic_folder", "atomic_write", "cannot_write", "end_with_parent", "is_vacant",
    "map_in_order",
]  # fmt: skip
