"""Opens Parquet files of annotations."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from crosslmm_jax.errors import UserError, first_line

if TYPE_CHECKING:
    from pyarrow import parquet


@contextlib.contextmanager
def open_parquet(path: str) -> "Iterator[parquet.ParquetFile]":
    """Opens a Parquet file. Reading errors inside become a UserError that names it."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            yield table
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        fix = "correct the path or download the file again"
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)}); {fix}") from error
