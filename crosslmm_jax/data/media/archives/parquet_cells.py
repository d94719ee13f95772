"""Media embedded in Parquet files, as the `datasets` library of Hugging Face writes them.

    reference                     the medium is
    a.parquet::17/image           the bytes in column `image` of row 17
    a.parquet::17/images/0        those of the first item of a list

A row group is read whole to give one of its rows, so this is fast only for rows in order, as when they are
indexed or packed.
"""

import functools
import os
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.errors import DataError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

_MEMBER = re.compile(r"(\d{1,18})/(.+?)(?:/(\d{1,9}))?", re.DOTALL)
_LOADING = threading.Lock()  # row groups are large: threads read one at a time


def is_parquet(path: str) -> bool:
    """Whether the name is that of a Parquet file."""
    return path.endswith(".parquet")


def cell_member(row: int, column: str, place: int | None = None) -> str:
    """The part after "::" of a reference to a cell, or to item `place` of the list in it."""
    return f"{row}/{column}" if place is None else f"{row}/{column}/{place}"


def read_cell(path: str, member: str) -> bytes:
    """The bytes at a reference.

    Args:
        path: a Parquet file.
        member: the part after "::" of the reference.

    Raises:
        DataError: there is no such cell, or no bytes in it ("missing"), or it cannot be read ("corrupt").
    """
    import pyarrow

    where = f"{path}::{member}"
    match = _MEMBER.fullmatch(member)
    if match is None:
        raise DataError(
            where, "missing", 'names no cell; write "ROW/COLUMN", or "ROW/COLUMN/NUMBER" of a list'
        )
    row, column, place = int(match[1]), match[2], match[3]
    try:
        mtime = os.stat(path).st_mtime_ns
        starts = _group_starts(path, mtime)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        with _LOADING:
            cells = _read_group(path, mtime, group, column) if row < starts[-1] else None
        value = None if cells is None else cells[row - int(starts[group])].as_py()
        value = value if place is None or value is None else value[int(place)]
    except (KeyError, IndexError):
        value = None
    except (OSError, pyarrow.ArrowException) as error:
        reason = first_line(error)
        raise DataError(where, "corrupt", f"cannot be read ({reason}); download the file again") from error
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(content, bytes) or not content:
        fix = "index the data set again, or download a version with embedded files"
        raise DataError(where, "missing", f"holds no bytes; {fix}")
    return content


def mean_cell_size(path: str) -> int:
    """Mean bytes per row of a Parquet file, without reading it; 0 when it cannot be read."""
    try:
        found = os.stat(path)
        return found.st_size // max(1, int(_group_starts(path, found.st_mtime_ns)[-1]))
    except (OSError, ValueError):  # of pyarrow too
        return 0


@functools.lru_cache(maxsize=128)
def _group_starts(path: str, mtime: int) -> np.ndarray:
    """int64[groups + 1], first row of each row group, and the number of rows."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


@functools.lru_cache(maxsize=2)
def _read_group(path: str, mtime: int, group: int, column: str) -> "pa.ChunkedArray":
    """A column of a row group. `mtime` is part of the cache key, for files that change."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(column)
