"""The index of a mixture: what training reads in place of annotations.

table.py    what an INDEX folder holds on disk; opens it and reads columns and rows
blocks.py   the unit in which an index is made, reused, and divided among machines
build.py    `crosslmm data index`: one parallel pass over the rows of a mixture
probe.py    what the pass finds about one row: its media by a probe, its tokens by counting
lookup.py   what earlier passes know about a row
publish.py  describes a finished pass; `crosslmm data merge`
"""

from crosslmm_jax.data.index.blocks import Shard, parse_shard
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.index.probe import (
    fingerprint,
    late_start,
    media_stamp,
    only_data_errors,
    probe_for,
    row_hash,
)
from crosslmm_jax.data.index.publish import IndexReport, merge_index
from crosslmm_jax.data.index.table import BAD, Columns, Index, RowStore, open_index

__all__ = [
    "BAD", "Columns", "Index", "IndexReport", "RowStore", "Shard", "build_index", "fingerprint",
    "late_start", "media_stamp", "merge_index", "only_data_errors", "open_index", "parse_shard", "probe_for",
    "row_hash",
]  # fmt: skip
