"""Reports about an index: `crosslmm data check` and `crosslmm data stats`.

check.py  decodes its media as training would, and lists the rows that fail
stats.py  counts, durations, lengths, and how full the buckets of a config are
"""

from crosslmm_jax.data.reports.check import Damaged, check_index
from crosslmm_jax.data.reports.stats import describe

__all__ = ["Damaged", "check_index", "describe"]
