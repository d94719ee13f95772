"""What an INDEX folder holds on disk, and how it is read.

    INDEX/rows-00000-00000.arrow ...   one record per training row: its text, its media, and what a probe of
                                       them found; rows are numbered over all files, in order
    INDEX/meta.json                    files, data sets, fingerprint of the tokenizer, digest of the content
    INDEX/bad-00000-00000.arrow ...    rows that cannot be used; only the next pass reads them
    INDEX/bad.jsonl                    the same rows for people, one `Fault` per line

Tables are Arrow IPC files of one record batch, not compressed, so that they are read where they are mapped: a
run reads the columns of numbers at its start, table by table, and the text of a row when the row is loaded.
"""

import bisect
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import ipc

from crosslmm_jax.data.annotations import MODALITIES, Row
from crosslmm_jax.data.media import DECODE_UP_TO, MAX_DAMAGED, MediaOptions
from crosslmm_jax.data.text import Turn
from crosslmm_jax.errors import UserError

VERSION = 7  # rises too when the same annotations give other rows, or a probe finds more
META = "meta.json"
BAD = "bad.jsonl"
_TURNS = json.JSONEncoder(ensure_ascii=False)  # made once: that takes as long as to encode a short row

Record = dict[str, Any]  # one row of a table, column of SCHEMA -> value; or the content of `meta.json`


class ProbeOptions(NamedTuple):
    """How media are probed, which decides on the rows of an index.

    Attributes:
        allow_outside: media may lie outside their root.
        decode_up_to: most frames of a video that is decoded to count damaged frames; None: all videos are.
        max_damaged: a video is refused if a larger share of its frames is damaged.
    """

    allow_outside: bool = False
    decode_up_to: int | None = DECODE_UP_TO
    max_damaged: float = MAX_DAMAGED

    def settles(self, record: Record) -> bool:
        """Whether a probe with these options would find again what an earlier `record` says of damage."""
        for damaged, frames in zip(record["damaged"], record["num_frames"], strict=True):
            if damaged is None:
                if self.decode_up_to is None or frames <= self.decode_up_to:
                    return False
            elif damaged > self.max_damaged * frames:
                return False
        return True


_NAME = pa.dictionary(pa.int32(), pa.string())  # few different values, stored once per table
_PER_MEDIUM = {
    "media": pa.string(), "duration": pa.float64(), "fps": pa.float64(), "num_frames": pa.int64(),
    "width": pa.int32(), "height": pa.int32(), "size_bytes": pa.int64(), "codec": pa.string(),
    "keyframe_spacing": pa.float64(),
    "damaged": pa.int64(),  # frames; null where they were not counted
    "stamp": pa.int64(),  # hash of the file's size and modification time
}  # fmt: skip
SCHEMA = pa.schema([
    ("where", pa.string()), ("dataset", _NAME), ("row", pa.int64()), ("modality", _NAME),
    ("root", _NAME), ("start", pa.float64()), ("end", pa.float64()),
    ("turns", pa.large_string()),  # the text of a table may exceed 2 GiB
    ("stream", pa.int32()), ("folder_fps", pa.float64()),  # `MediaOptions`; null where the row says none
    ("own_system", pa.bool_()),
    ("text_tokens", pa.int32()),  # in the chat style with the default system prompt
    # Tokens and media up to the end of each answer: the lengths that truncation can choose from.
    ("answer_tokens", pa.list_(pa.int32())), ("answer_media", pa.list_(pa.int32())),
    ("plain_tokens", pa.int32()),  # in the plain style; 0 when the row does not fit that style
    ("row_hash", pa.int64()),
    *((name, pa.list_(kind)) for name, kind in _PER_MEDIUM.items()),
])  # fmt: skip
PROBED = (
    "media", "duration", "fps", "num_frames", "width", "height", "size_bytes", "codec", "keyframe_spacing",
    "damaged", "stamp",
)  # fmt: skip
COUNTED = ("text_tokens", "answer_tokens", "answer_media", "plain_tokens")
_LISTS = ("answer_tokens", "answer_media", "duration", "fps", "num_frames")  # those of `Columns`
_NUMBERS = (
    "modality", "dataset", "text_tokens", "plain_tokens", "own_system", "start", "end", *_LISTS,
)  # fmt: skip
_ROW_COLUMNS = (
    "where", "dataset", "row", "modality", "media", "root", "start", "end", "turns", "stream", "folder_fps",
)  # fmt: skip


def write_table(path: Path, table: pa.Table) -> None:
    """Writes a table of SCHEMA, which is complete or absent."""
    incomplete = path.with_name(f"{path.name}.incomplete")
    table = table.unify_dictionaries().combine_chunks()
    with ipc.new_file(incomplete, table.schema) as file:
        file.write_table(table)
    os.replace(incomplete, path)


def map_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.RecordBatch:
    """Maps a table, or some of its columns, into memory. It holds no open file.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
        KeyError: it lacks one of `columns`.
    """
    # Arrow keeps the mapping for as long as an array uses it, and closes the file here.
    with pa.memory_map(str(path)) as source:
        options = ipc.IpcReadOptions()
        if columns is not None:
            options.included_fields = [SCHEMA.get_field_index(name) for name in columns]
        file = ipc.open_file(source, options=options)
        empty = pa.RecordBatch.from_pylist([], schema=file.schema)
        table = file.get_batch(0) if file.num_record_batches else empty
    if columns is not None and set(table.schema.names) != set(columns):
        raise KeyError(*columns)
    return table


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of numbers, over all rows in order.

    Attributes:
        modality: uint8[rows], position in MODALITIES.
        dataset: int32[rows], position in `Index.datasets`.
        text_tokens: int32[rows], in the chat style with the default system prompt.
        plain_tokens: int32[rows], in the plain style; 0 where a row does not fit that style.
        own_system: bool[rows], whether the row has a system prompt.
        start: float64[rows], seconds; 0 without bounds.
        end: float64[rows], seconds; infinite without bounds.
        answers_per_row: int64[rows], at least 1.
        answer_tokens: int32[answers], text tokens of the row up to the end of the answer.
        answer_media: int32[answers], media of the row up to the end of the answer.
        media_per_row: int64[rows].
        duration: float64[media], seconds; 0 for an image.
        fps: float64[media].
        num_frames: int64[media].
    """

    modality: np.ndarray
    dataset: np.ndarray
    text_tokens: np.ndarray
    plain_tokens: np.ndarray
    own_system: np.ndarray
    start: np.ndarray
    end: np.ndarray
    answers_per_row: np.ndarray
    answer_tokens: np.ndarray
    answer_media: np.ndarray
    media_per_row: np.ndarray
    duration: np.ndarray
    fps: np.ndarray
    num_frames: np.ndarray


@dataclasses.dataclass(frozen=True)
class Index:
    """An INDEX folder.

    Attributes:
        folder: path of the folder.
        files: names of its tables.
        rows: number of rows of each table.
        datasets: names of the data sets.
        weights: weight of each data set.
        tokenizer: fingerprint of the tokenizer that counted the tokens.
        wording: time instruction -> tokens of its words.
        digest: hash of rows, lengths of videos, tokenizer and weights. Indexes with the same digest give the
            same batches.
        stamp: inode and modification time of its `meta.json`.
    """

    folder: str
    files: tuple[str, ...]
    rows: tuple[int, ...]
    datasets: tuple[str, ...]
    weights: tuple[float, ...]
    tokenizer: str
    wording: dict[str, int]
    digest: str
    stamp: tuple[int, int] = dataclasses.field(default=(0, 0), compare=False)

    def __len__(self) -> int:
        return sum(self.rows)

    def tables_of_columns(self) -> Iterator[Columns]:
        """The columns of numbers, table by table, each mapped and not copied where possible.

        Raises:
            UserError: a table cannot be read. Names it.
        """
        for file, rows in zip(self.files, self.rows, strict=True):
            if rows:
                yield _numbers(_map_of_index(os.path.join(self.folder, file), _NUMBERS), self.datasets)

    def columns(self) -> Columns:
        """The columns of numbers of all rows. Raises UserError as `tables_of_columns` does."""
        parts = list(self.tables_of_columns())
        names = [field.name for field in dataclasses.fields(Columns)]
        return Columns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def was_rebuilt(self) -> bool:
        """Whether the folder holds another index now."""
        return _stamp(Path(self.folder) / META) != self.stamp and open_index(self.folder) != self


def open_index(folder: str | os.PathLike[str]) -> Index:
    """Reads `meta.json` of an INDEX folder.

    Raises:
        UserError: there is no index, or it is damaged, of another version, or has no rows.
    """
    path = Path(folder) / META
    make = f"crosslmm data index MIXTURE.yaml --out {shlex.quote(str(folder))}"
    try:
        stamp = _stamp(path)
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["version"] != VERSION:
            raise UserError(
                f"{path}: has version {meta['version']} and this program reads {VERSION}; make the index anew"
                f" with `{make}`"
            )
        if "shard" in meta:
            whole = re.sub(r"\.shard-\d+-of-\d+$", "", str(folder))
            raise UserError(
                f"{folder}: is a part of an index; run `crosslmm data merge {shlex.quote(whole)}` first"
            )
        index = Index(
            folder=str(folder),
            files=tuple(entry["file"] for entry in meta["files"]),
            rows=tuple(entry["rows"] for entry in meta["files"]),
            datasets=tuple(entry["name"] for entry in meta["datasets"]),
            weights=tuple(entry["weight"] for entry in meta["datasets"]),
            tokenizer=meta["tokenizer"],
            wording=meta["wording"],
            digest=meta["digest"],
            stamp=stamp,
        )
    except FileNotFoundError:
        raise UserError(f"{folder}: no index; make it with `{make}`") from None
    except NotADirectoryError:
        raise UserError(
            f"{folder}: is no folder; name the INDEX that `crosslmm data index MIXTURE.yaml --out INDEX` made"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    if not len(index):
        raise UserError(f"{folder}: holds no usable row; see {BAD} in it")
    return index


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _map_of_index(path: str, columns: Sequence[str]) -> pa.RecordBatch:
    try:
        return map_table(path, columns)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise _unreadable(path, error) from error


def _numbers(table: pa.RecordBatch, datasets: tuple[str, ...]) -> Columns:
    get = {name: table.column(name) for name in _NUMBERS}
    lengths = {name: np.diff(get[name].offsets.to_numpy()).astype(np.int64) for name in _LISTS}
    return Columns(
        modality=_positions(get["modality"], MODALITIES).astype(np.uint8),
        dataset=_positions(get["dataset"], datasets),
        text_tokens=get["text_tokens"].to_numpy(),
        plain_tokens=get["plain_tokens"].to_numpy(),
        own_system=get["own_system"].to_numpy(zero_copy_only=False),
        start=get["start"].fill_null(0.0).to_numpy(),
        end=get["end"].fill_null(np.inf).to_numpy(),
        answers_per_row=lengths["answer_tokens"],
        media_per_row=lengths["num_frames"],
        **{name: get[name].flatten().to_numpy() for name in _LISTS},
    )


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({error}); run `crosslmm data index` again")


def _positions(values: pa.DictionaryArray, names: tuple[str, ...]) -> np.ndarray:
    """int32[rows], the position of each value in `names`."""
    places = np.array([names.index(name) for name in values.dictionary.to_pylist()], np.int32)
    return places[values.indices.to_numpy()]


class RowStore:
    """Rows by their number, read from mapped tables. Threads may call it, and no lock is taken."""

    def __init__(self, index: Index) -> None:
        """Maps no table yet: a copy in another process maps the tables itself."""
        self.index = index
        self._begins = np.concatenate([[0], np.cumsum(index.rows)]).tolist()
        # Number of a table -> its _ROW_COLUMNS, and the column of damaged frames.
        self._tables: dict[int, list[pa.Array]] = {}

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, number: int) -> Row:
        """Reads row `number`. Raises UserError when a table cannot be read, or the index was rebuilt."""
        (*columns, _), place = self._find(number)
        return row_of({name: c[place].as_py() for name, c in zip(_ROW_COLUMNS, columns, strict=True)})

    def damaged(self, number: int) -> list[int | None]:
        """Damaged frames of each medium of row `number`; None where they were not counted."""
        (*_, damaged), place = self._find(number)
        return damaged[place].as_py()

    def _find(self, number: int) -> tuple[list[pa.Array], int]:
        """The columns of the table of row `number`, and its place in them."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        file = bisect.bisect_right(self._begins, number) - 1
        return self._tables.get(file) or self._map(file), number - self._begins[file]

    def _map(self, file: int) -> list[pa.Array]:
        if self.index.was_rebuilt():
            raise UserError(f"{self.index.folder}: was rebuilt while it was read; start again")
        names = (*_ROW_COLUMNS, "damaged")
        table = _map_of_index(os.path.join(self.index.folder, self.index.files[file]), names)
        # Two threads may both map it; the tables are equal.
        self._tables[file] = [table.column(name) for name in names]
        return self._tables[file]

    def __getstate__(self) -> Index:
        return self.index

    def __setstate__(self, index: Index) -> None:
        self.__init__(index)


def row_of(record: Record) -> Row:
    """The row of a record: the inverse of `record_of`."""
    bounds = None
    if record["start"] is not None:
        bounds = (record["start"], record["end"])
    turns = tuple(Turn(role, text) for role, text in json.loads(record["turns"]))
    return Row(
        where=record["where"], dataset=record["dataset"], row=record["row"], modality=record["modality"],
        media=tuple(record["media"]), root=record["root"], bounds=bounds, turns=turns,
        media_options=MediaOptions(record["stream"], record["folder_fps"]),
    )  # fmt: skip


def record_of(row: Row) -> Record:
    """The columns of SCHEMA that a row fills; probing adds the others.

    The media root becomes absolute, so that the index can be used from any working folder.
    """
    start, end = row.bounds or (None, None)
    root = row.root if os.path.isabs(row.root) else os.path.join(os.getcwd(), row.root)
    return {
        "where": row.where, "dataset": row.dataset, "row": row.row, "modality": row.modality,
        "root": root, "start": start, "end": end,
        "media": list(row.media),
        **row.media_options._asdict(),
        "turns": _TURNS.encode([[turn.role, turn.text] for turn in row.turns]),
        "own_system": bool(row.turns) and row.turns[0].role == "system",
    }  # fmt: skip
