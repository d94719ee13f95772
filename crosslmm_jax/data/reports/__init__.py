"""TODO."""

from crosslmm_jax.data.reports.check import check_index
from crosslmm_jax.data.reports.stats import describe

__all__ = [
    "check_index",
    "describe",
]
