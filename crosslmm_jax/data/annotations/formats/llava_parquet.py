"""LLaVA's rows in Parquet files with the bytes of their images, as of LLaVA-OneVision and LLaVA-NeXT.

Columns: id, conversations, and `image` (bytes and path, as the `datasets` library writes them) or a list of
them; `video` likewise. Training reads rows in any order, for which Parquet is slow. So pack the data set
first: `crosslmm data to-tfds`.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from crosslmm_jax.data.annotations.formats.llava import ALIASES
from crosslmm_jax.data.annotations.json_files import files_of
from crosslmm_jax.data.annotations.parquet_files import open_parquet
from crosslmm_jax.data.annotations.rows import DatasetSpec, Entry, Origin, Row
from crosslmm_jax.data.media import cell_member
from crosslmm_jax.errors import UserError

if TYPE_CHECKING:
    from pyarrow import parquet

_MEDIA = {"image": "images", "images": "images", "video": "videos", "videos": "videos"}
_TURNS = ("conversations", *(alias for alias, name in ALIASES.items() if name == "conversations"))
_OTHERS = ("id", "start", "end", "stream", "folder_fps", "video_read_type")


class ParquetRow(NamedTuple):
    """One row, without the bytes of its media.

    Attributes:
        file: the Parquet file.
        turns: its conversation.
        media: kind of media, "images" or "videos" -> references.
        others: its values in the columns of _OTHERS.
    """

    file: str
    turns: object
    media: dict[str, list[str]]
    others: Mapping[str, object]


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The rows of all files in order, read in batches and without their media.

    Raises:
        UserError: a file cannot be read, or has no such columns.
    """
    for file in files_of(spec.path, ".parquet"):
        with open_parquet(file) as table:
            yield from _rows(table, file)


def _rows(table: "parquet.ParquetFile", file: str) -> Iterator[Entry]:
    names = table.schema_arrow.names
    turns = next((name for name in _TURNS if name in names), None)
    if turns is None:
        raise UserError(f"{file}: has no column 'conversations'; its columns are {', '.join(names)}")
    leaves = {name: _leaf(table, name, file) for name in _MEDIA if name in names}
    others = [name for name in _OTHERS if name in names]
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=[turns, *others, *leaves.values()]):
        for row in batch.to_pylist():
            media: dict[str, list[str]] = {}
            for name in leaves:
                media.setdefault(_MEDIA[name], []).extend(_references(file, number, name, row[name]))
            where = f"{file}: row {number}" + (f" (id {row['id']})" if row.get("id") is not None else "")
            yield Entry(where, ParquetRow(file, row[turns], media, {name: row[name] for name in others}))
            number += 1


def _leaf(table: "parquet.ParquetFile", column: str, file: str) -> str:
    """The part of a column of media to read: it tells which cells hold one, and has no bytes if possible."""
    schema = table.schema
    paths = [schema.column(place).path for place in range(len(schema))]
    inner = [path for path in paths if path.startswith(f"{column}.")]
    if not any(path.endswith(".bytes") for path in inner):
        hint = "write the files to a folder, and their paths and conversations as JSON"
        raise UserError(f"{file}: column {column!r} holds no bytes of files; {hint}")
    return next((path for path in inner if path.endswith(".path")), inner[0])


def _references(file: str, row: int, column: str, cell: object) -> list[str]:
    """References to the media in a cell, relative to the folder of the file."""
    name = os.path.basename(file)
    if cell is None:
        return []
    places = [None] if not isinstance(cell, list) else range(len(cell))
    return [f"{name}::{cell_member(row, column, place)}" for place in places]


def to_row(value: ParquetRow, origin: Origin) -> Row:
    """The row, its media relative to the folder of its file. As in LLaVA, images come before videos."""
    root = os.path.dirname(value.file) or "."
    origin = dataclasses.replace(origin, spec=dataclasses.replace(origin.spec, root=root))
    wanted = {"image": ("images",), "video": ("videos",), "text": ()}
    kinds = wanted.get(origin.spec.media_type or "", ("images", "videos"))
    kind = next((kind for kind in kinds if value.media.get(kind)), None)
    media: dict[str, Any] = {} if kind is None else {kind: value.media[kind]}
    bounds = origin.bounds(value.others.get("start"), value.others.get("end"))
    options = origin.media_options(value.others)
    return origin.make_row(value.turns, bounds=bounds, options=options, **media)
