"""TODO."""

from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.index.probe import fingerprint, guarded, late_start, probe_for, row_hash, stamp
from crosslmm_jax.data.index.table import BAD, Columns, Index, RowStore, open_index

__all__ = [
    "BAD",
    "Columns",
    "Index",
    "RowStore",
    "build_index",
    "fingerprint",
    "guarded",
    "late_start",
    "open_index",
    "probe_for",
    "row_hash",
    "stamp",
]
