"""The index of a mixture: what training reads in place of annotations.

table.py  what an INDEX folder holds on disk; opens it and reads columns and rows
build.py  `crosslmm data index`: one parallel pass over the rows of a mixture
probe.py  what the pass finds about one row: its media by a probe, its tokens by counting
"""

from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.index.probe import (
    fingerprint,
    late_start,
    media_stamp,
    only_data_errors,
    probe_for,
    row_hash,
)
from crosslmm_jax.data.index.table import BAD, Columns, Index, RowStore, open_index

__all__ = [
    "BAD", "Columns", "Index", "RowStore", "build_index", "fingerprint", "late_start", "media_stamp",
    "only_data_errors", "open_index", "probe_for", "row_hash",
]  # fmt: skip
