"""The index of a mixture: what training reads instead of annotations.

    INDEX/rows-00000.parquet ...   one row of a table for each training row: its text, its media, and what a
                                   probe of them found; rows are numbered over all files, in order
    INDEX/meta.json                files, data sets, what its tokenizer is like, and a digest of the content
    INDEX/kept-00000.parquet ...   what earlier passes found of rows whose media are not there now; only the
                                   next pass reads it, so that a disk that was away is not probed again
    INDEX/bad.jsonl                rows that cannot be used, one a line: row, path, reason, where, detail

Columns with numbers are read at the start of a run; the text of a row is read when its turn comes.
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

VERSION = 3
META = "meta.json"
BAD = "bad.jsonl"
ROW_GROUP = 1024  # rows that are decoded to read one of them
_KEPT_GROUPS = 16  # decoded groups that a process keeps
_KEPT_FILES = 128  # open tables that it keeps; a large index has more than a process may open

_PER_MEDIUM = {
    "media": pa.string(), "duration": pa.float64(), "fps": pa.float64(), "num_frames": pa.int64(),
    "width": pa.int32(), "height": pa.int32(), "size_bytes": pa.int64(), "codec": pa.string(),
    "keyframe_spacing": pa.float64(),
    "stamp": pa.int64(),  # of the file's size and time of change
}  # fmt: skip
SCHEMA = pa.schema([
    ("where", pa.string()), ("dataset", pa.string()), ("row", pa.int64()), ("modality", pa.string()),
    ("root", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("turns", pa.string()),
    ("read_type", pa.string()), ("own_system", pa.bool_()),
    ("text_tokens", pa.int32()),  # in the chat style with the default system prompt
    # Of it, up to and with each answer: what truncation may leave.
    ("answer_tokens", pa.list_(pa.int32())), ("answer_media", pa.list_(pa.int32())),
    ("plain_tokens", pa.int32()),  # in the plain style; 0 when the row does not fit it
    ("row_hash", pa.int64()),
    *((name, pa.list_(kind)) for name, kind in _PER_MEDIUM.items()),
])  # fmt: skip
_RAGGED = ("answer_tokens", "answer_media", "duration", "fps", "num_frames")  # those of `Columns`
_ROW_COLUMNS = [
    "where", "dataset", "row", "modality", "media", "root", "start", "end", "turns", "read_type",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Columns:
    """The numbers of all rows.

    Attributes:
        modality: uint8[rows], codes of MODALITIES.
        dataset: int32[rows], places in `Index.datasets`.
        text_tokens: int32[rows], in the chat style with the default system prompt.
        plain_tokens: int32[rows], in the plain style; 0 where a row does not fit it.
        own_system: bool[rows], the row brings a system prompt of its own.
        start: float64[rows], seconds; 0 without bounds.
        end: float64[rows], seconds; infinite without bounds.
        answers_per_row: int64[rows], at least 1.
        answer_tokens: int32[answers], of text_tokens those up to and with each answer, of all rows in order.
        answer_media: int32[answers], media up to there.
        media_per_row: int64[rows].
        duration: float64[media], seconds, of all media of all rows in order.
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
        folder: its path.
        files: its tables.
        rows: of each table.
        datasets: names.
        weights: of each data set.
        tokenizer: fingerprint of the tokenizer that counted its tokens.
        wording: tokens of the words of each time instruction.
        digest: of its rows, the lengths of their videos, the tokenizer and the weights; two indexes with the
            same one give the same batches.
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
        """Reads the numbers of all rows. Raises UserError naming a table that cannot be read."""
        parts = [_read_numbers(self._path(file), self.datasets) for file in self.files]
        return Columns(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _path(self, file: str) -> str:
        return os.path.join(self.folder, file)


def open_index(folder: str | os.PathLike[str]) -> Index:
    """Reads `meta.json` of an INDEX folder.

    Raises:
        UserError: there is no index, it is damaged, of another version, or holds no rows.
    """
    path = Path(folder) / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["version"] != VERSION:
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
        raise UserError(f"{path}: cannot be read ({error}); run `crosslmm data index` again") from error
    if not len(index):
        raise UserError(f"{folder}: holds no usable row; see {BAD} in it")
    return index


def _read_numbers(path: str, datasets: tuple[str, ...]) -> dict[str, np.ndarray]:
    names = [
        "modality", "dataset", "text_tokens", "plain_tokens", "own_system", "start", "end", *_RAGGED,
    ]  # fmt: skip
    table = _read_table(path, names)
    get = {name: table.column(name).combine_chunks() for name in names}
    lengths = {name: np.diff(get[name].offsets.to_numpy()).astype(np.int64) for name in _RAGGED}
    return {
        "modality": _codes(get["modality"], MODALITIES).astype(np.uint8),
        "dataset": _codes(get["dataset"], datasets),
        "text_tokens": get["text_tokens"].to_numpy(),
        "plain_tokens": get["plain_tokens"].to_numpy(),
        "own_system": get["own_system"].to_numpy(zero_copy_only=False),
        "start": get["start"].fill_null(0.0).to_numpy(),
        "end": get["end"].fill_null(np.inf).to_numpy(),
        "answers_per_row": lengths["answer_tokens"],
        "media_per_row": lengths["num_frames"],
        **{name: get[name].flatten().to_numpy() for name in _RAGGED},
    }


def _read_table(path: str, columns: list[str]) -> Any:
    try:
        return pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({error}); run `crosslmm data index` again") from error


def _codes(values: Any, names: tuple[str, ...]) -> np.ndarray:
    """int32, the places of `values` in `names`."""
    encoded = values.dictionary_encode()
    places = np.array([names.index(name) for name in encoded.dictionary.to_pylist()], np.int32)
    return places[encoded.indices.to_numpy()]


class RowStore:
    """Rows by their number, read from the tables when asked for. Calls may come from several threads."""

    def __init__(self, index: Index) -> None:
        """Opens nothing yet: a copy sent to another process opens the tables for itself."""
        self.index = index
        self._begins = np.concatenate([[0], np.cumsum(index.rows)]).tolist()
        self._reset()

    def _reset(self) -> None:
        self._files: collections.OrderedDict[int, pq.ParquetFile] = collections.OrderedDict()
        self._groups: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, number: int) -> Row:
        """Row `number`. Raises UserError when a table cannot be read, or is one of an index made since."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        file = bisect.bisect_right(self._begins, number) - 1
        group, place = divmod(number - self._begins[file], ROW_GROUP)
        with self._lock:
            table = self._group(file, group)
        return row_of(table.slice(place, 1).to_pylist()[0])

    def _group(self, file: int, group: int) -> Any:
        key = (file, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        path = os.path.join(self.index.folder, self.index.files[file])
        try:
            if file not in self._files:
                if open_index(self.index.folder) != self.index:
                    raise UserError(f"{self.index.folder}: was made anew while it was read; start again")
                self._files[file] = pq.ParquetFile(path)
                if len(self._files) > _KEPT_FILES:
                    self._files.popitem(last=False)[1].close()
            self._files.move_to_end(file)
            table = self._files[file].read_row_group(group, columns=_ROW_COLUMNS, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({error}); run `crosslmm data index` again") from error
        self._groups[key] = table
        if len(self._groups) > _KEPT_GROUPS:
            self._groups.popitem(last=False)
        return table

    def __getstate__(self) -> Index:
        return self.index

    def __setstate__(self, index: Index) -> None:
        self.__init__(index)


def row_of(record: dict[str, Any]) -> Row:
    """The row that `record_of` took apart."""
    bounds = None
    if record["start"] is not None:
        bounds = (record["start"], record["end"])
    turns = tuple(Turn(role, text) for role, text in json.loads(record["turns"]))
    return Row(
        where=record["where"], dataset=record["dataset"], row=record["row"], modality=record["modality"],
        media=tuple(record["media"]), root=record["root"], bounds=bounds, turns=turns,
        read_type=record["read_type"],
    )  # fmt: skip


def record_of(row: Row) -> dict[str, Any]:
    """What SCHEMA holds of the row itself; probing adds the rest.

    The folder of its media is made absolute, so that the index can be used from any working folder.
    """
    start, end = row.bounds or (None, None)
    return {
        "where": row.where, "dataset": row.dataset, "row": row.row, "modality": row.modality,
        "root": os.path.join(os.getcwd(), row.root), "start": start, "end": end,
        "read_type": row.read_type, "media": list(row.media),
        "turns": json.dumps([[turn.role, turn.text] for turn in row.turns], ensure_ascii=False),
        "own_system": bool(row.turns) and row.turns[0].role == "system",
    }  # fmt: skip
