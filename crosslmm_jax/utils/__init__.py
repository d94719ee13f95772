"""Helpers without project knowledge: atomic folders, paths, progress, worker processes.

atomic_folder    files and folders that are complete or absent
paths            what may be wrong with a path, for messages
progress         progress of a long task, on a terminal or in a log
workers          worker processes that end with their parent
"""

from crosslmm_jax.utils.atomic_folder import atomic_folder, atomic_write, cannot_write, is_vacant
from crosslmm_jax.utils.paths import cannot_read, check_local, guess_meant, is_lfs_pointer
from crosslmm_jax.utils.progress import Progress
from crosslmm_jax.utils.workers import end_with_parent, kill_with_parent, map_in_order, work_for_parent

__all__ = [
    "Progress", "atomic_folder", "atomic_write", "cannot_read", "cannot_write", "check_local",
    "end_with_parent", "guess_meant", "is_lfs_pointer", "is_vacant", "kill_with_parent",
    "map_in_order", "work_for_parent",
]  # fmt: skip
