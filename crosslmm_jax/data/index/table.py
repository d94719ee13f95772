"""What an INDEX folder holds on disk, and how it is read.

    INDEX/rows-00000.parquet ...   one record per training row: its text, its media, and what a probe of them
                                   found; rows are numbered over all files, in order
    INDEX/meta.json                files, data sets, fingerprint of the tokenizer, digest of the content
    INDEX/kept-00000.parquet ...   records of rows whose media are missing now; only the next pass reads them,
                                   so that a disk that was not mounted is not probed again
    INDEX/bad.jsonl                rows that cannot be used, one `Fault` per line

A run reads the columns of numbers at its start, and the text of a row when the row is loaded.
"""

import bisect
import collections
import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crosslmm_jax.data.annotations import MODALITIES, Row
from crosslmm_jax.data.text import Turn
from crosslmm_jax.errors import UserError

VERSION = 4
_READABLE = (3, 4)  # version 3 has one more column, `read_type`, which had no effect
META = "meta.json"
BAD = "bad.jsonl"
ROW_GROUP = 1024  # rows of a Parquet row group; all are decoded to read one
_KEPT_GROUPS = 16  # decoded row groups that a process keeps
_KEPT_FILES = 128  # open tables that a process keeps; a large index has more than a process may open

Record = dict[str, Any]  # one row of a table: column of SCHEMA -> value

_PER_MEDIUM = {
    "media": pa.string(), "duration": pa.float64(), "fps": pa.float64(), "num_frames": pa.int64(),
    "width": pa.int32(), "height": pa.int32(), "size_bytes": pa.int64(), "codec": pa.string(),
    "keyframe_spacing": pa.float64(),
    "stamp": pa.int64(),  # hash of the file's size and modification time
}  # fmt: skip
SCHEMA = pa.schema([
    ("where", pa.string()), ("dataset", pa.string()), ("row", pa.int64()), ("modality", pa.string()),
    ("root", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("turns", pa.string()),
    ("own_system", pa.bool_()),
    ("text_tokens", pa.int32()),  # in the chat style with the default system prompt
    # Tokens and media up to the end of each answer: the lengths that truncation can choose from.
    ("answer_tokens", pa.list_(pa.int32())), ("answer_media", pa.list_(pa.int32())),
    ("plain_tokens", pa.int32()),  # in the plain style; 0 when the row does not fit that style
    ("row_hash", pa.int64()),
    *((name, pa.list_(kind)) for name, kind in _PER_MEDIUM.items()),
])  # fmt: skip
_LISTS = ("answer_tokens", "answer_media", "duration", "fps", "num_frames")  # those of `Columns`
_ROW_COLUMNS = [
    "where", "dataset", "row", "modality", "media", "root", "start", "end", "turns",
]  # fmt: skip


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
    """

    folder: str
    files: tuple[str, ...]
    rows: tuple[int, ...]
    datasets: tuple[str, ...]
    weights: tuple[float, ...]
    tokenizer: str
    wording: dict[str, int]
    digest: str

    def __len__(self) -> int:
        return sum(self.rows)

    def columns(self) -> Columns:
        """Reads the columns of numbers. Raises UserError, naming the table, when one cannot be read."""
        parts = [_read_numbers(os.path.join(self.folder, file), self.datasets) for file in self.files]
        return Columns(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def open_index(folder: str | os.PathLike[str]) -> Index:
    """Reads `meta.json` of an INDEX folder.

    Raises:
        UserError: there is no index, or it is damaged, of another version, or has no rows.
    """
    path = Path(folder) / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["version"] not in _READABLE:
            raise UserError(f"{path}: is of another version; run `crosslmm data index` again")
        index = Index(
            folder=str(folder),
            files=tuple(entry["file"] for entry in meta["files"]),
            rows=tuple(entry["rows"] for entry in meta["files"]),
            datasets=tuple(entry["name"] for entry in meta["datasets"]),
            weights=tuple(entry["weight"] for entry in meta["datasets"]),
            tokenizer=meta["tokenizer"],
            wording=meta["wording"],
            digest=meta["digest"],
        )
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no index; make it with `crosslmm data index MIXTURE.yaml --out {folder}`"
        ) from None
    except NotADirectoryError:
        raise UserError(
            f"{folder}: is no folder; name the INDEX that `crosslmm data index MIXTURE.yaml --out INDEX` made"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    if not len(index):
        raise UserError(f"{folder}: holds no usable row; see {BAD} in it")
    return index


def _read_numbers(path: str, datasets: tuple[str, ...]) -> dict[str, np.ndarray]:
    names = [
        "modality", "dataset", "text_tokens", "plain_tokens", "own_system", "start", "end", *_LISTS,
    ]  # fmt: skip
    try:
        table = pq.read_table(path, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    get = {name: table.column(name).combine_chunks() for name in names}
    lengths = {name: np.diff(get[name].offsets.to_numpy()).astype(np.int64) for name in _LISTS}
    return {
        "modality": _positions(get["modality"], MODALITIES).astype(np.uint8),
        "dataset": _positions(get["dataset"], datasets),
        "text_tokens": get["text_tokens"].to_numpy(),
        "plain_tokens": get["plain_tokens"].to_numpy(),
        "own_system": get["own_system"].to_numpy(zero_copy_only=False),
        "start": get["start"].fill_null(0.0).to_numpy(),
        "end": get["end"].fill_null(np.inf).to_numpy(),
        "answers_per_row": lengths["answer_tokens"],
        "media_per_row": lengths["num_frames"],
        **{name: get[name].flatten().to_numpy() for name in _LISTS},
    }


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path}: cannot be read ({error}); run `crosslmm data index` again")


def _positions(values: pa.Array, names: tuple[str, ...]) -> np.ndarray:
    """int32[rows], the position of each value in `names`."""
    encoded = values.dictionary_encode()
    places = np.array([names.index(name) for name in encoded.dictionary.to_pylist()], np.int32)
    return places[encoded.indices.to_numpy()]


class RowStore:
    """Rows by their number, read from the tables on demand. Safe to call from several threads."""

    def __init__(self, index: Index) -> None:
        """Opens no table yet: a copy in another process opens the tables itself."""
        self.index = index
        self._begins = np.concatenate([[0], np.cumsum(index.rows)]).tolist()
        self._files: collections.OrderedDict[int, pq.ParquetFile] = collections.OrderedDict()
        self._groups: collections.OrderedDict[tuple[int, int], pa.Table] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, number: int) -> Row:
        """Reads row `number`. Raises UserError when a table cannot be read, or the index was rebuilt."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        file = bisect.bisect_right(self._begins, number) - 1
        group, place = divmod(number - self._begins[file], ROW_GROUP)
        with self._lock:
            table = self._group(file, group)
        return row_of(table.slice(place, 1).to_pylist()[0])

    def _group(self, file: int, group: int) -> pa.Table:
        key = (file, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        path = os.path.join(self.index.folder, self.index.files[file])
        try:
            if file not in self._files:
                if open_index(self.index.folder) != self.index:
                    raise UserError(f"{self.index.folder}: was rebuilt while it was read; start again")
                self._files[file] = pq.ParquetFile(path)
                if len(self._files) > _KEPT_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(file)
            table = self._files[file].read_row_group(group, columns=_ROW_COLUMNS, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error
        self._groups[key] = table
        if len(self._groups) > _KEPT_GROUPS:
            self._groups.popitem(last=False)
        return table

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
    )  # fmt: skip


def record_of(row: Row) -> Record:
    """The columns of SCHEMA that a row fills; probing adds the others.

    The media root becomes absolute, so that the index can be used from any working folder.
    """
    start, end = row.bounds or (None, None)
    return {
        "where": row.where, "dataset": row.dataset, "row": row.row, "modality": row.modality,
        "root": os.path.join(os.getcwd(), row.root), "start": start, "end": end,
        "media": list(row.media),
        "turns": json.dumps([[turn.role, turn.text] for turn in row.turns], ensure_ascii=False),
        "own_system": bool(row.turns) and row.turns[0].role == "system",
    }  # fmt: skip
