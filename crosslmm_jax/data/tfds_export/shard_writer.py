"""Writes one ArrayRecord file of rows with their media, for `to_tfds`. The file is complete or absent."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from crosslmm_jax.data.annotations import Row
from crosslmm_jax.data.index import late_start, media_stamp, only_data_errors, probe_for, row_hash
from crosslmm_jax.data.media import (
    FRAMES_PREFIX,
    Media,
    PathOrMedia,
    is_parquet,
    is_record_file,
    kind_of,
    list_pictures,
    mean_cell_size,
    mean_record_size,
    open_file,
    open_media,
    resolve_path,
    size_of,
    split_reference,
)
from crosslmm_jax.data.text import writable
from crosslmm_jax.errors import DataError, Fault
from crosslmm_jax.utils import cannot_write

_MOST_BYTES = 2**31 - 2**20  # media of one row: a record is a protobuf message, which must be below 2 GiB


@dataclasses.dataclass(frozen=True)
class Shard:
    """The rows of one file in order, with a Fault in the place of a row that cannot be used."""

    number: int
    rows: tuple[Row | Fault, ...]
    allow_outside: bool

    def digest(self) -> str:
        """A hash of the rows and of the stamps of their files."""
        content: list[object] = [self.allow_outside]
        for row in self.rows:
            if isinstance(row, Row):
                content.append(
                    [row_hash(row), row.row, row.root, [media_stamp(row.root, name) for name in row.media]]
                )
            else:
                content.append(row.line())
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """What was written of a shard.

    Attributes:
        digest: digest of the shard.
        file: name of the file.
        datasets: data set -> number of records.
        size_bytes: size of the records.
        bad: rows that could not be used.
    """

    digest: str
    file: str
    datasets: dict[str, int]
    size_bytes: int
    bad: tuple[Fault, ...]

    @property
    def rows(self) -> int:
        """Records in the file."""
        return sum(self.datasets.values())


def row_size(row: Row, *, allow_outside: bool) -> int:
    """Estimates the bytes of a row from the sizes of its media, without reading them."""
    media = sum(_size(row.root, reference, allow_outside) for reference in row.media)
    return media + sum(len(turn.text) for turn in row.turns)


@functools.lru_cache(maxsize=4096)
def _size(root: str, reference: str, allow_outside: bool) -> int:
    file, member = split_reference(reference)
    with contextlib.suppress(OSError, DataError):
        if member is not None and is_record_file(file):
            return mean_record_size(resolve_path(root, file, allow_outside=allow_outside))
        if member is not None and is_parquet(file):
            return mean_cell_size(resolve_path(root, file, allow_outside=allow_outside))
        medium = open_media(root, reference, allow_outside=allow_outside)
        return sum(size_of(file) for file in _files(medium))
    return 0


@functools.cache
def tfds_features() -> Any:
    """The features of a record. Times are texts, since tf.train.Example stores float32."""
    from tensorflow_datasets import features

    return features.FeaturesDict({
        "conversations": features.Sequence({"role": features.Text(), "content": features.Text()}),
        "images": features.Sequence(features.Text()),
        "videos": features.Sequence(features.Text()),
        "media_names": features.Sequence(features.Text()),
        "media_files": features.Sequence(features.Scalar(np.int64)),
        "start": features.Text(),
        "end": features.Text(),
        "stream": features.Text(),
        "folder_fps": features.Text(),
        "dataset": features.Text(),
        "row": features.Scalar(np.int64),
    })  # fmt: skip


def write_shard(shard: Shard, folder: str) -> ShardResult:
    """Writes a shard to `folder`, unless an earlier run wrote the same there.

    Raises:
        UserError: the file cannot be written.
    """
    name = f"shard-{shard.number:05d}"
    path, note, digest = Path(folder, name), Path(folder, f"{name}.json"), shard.digest()
    earlier = _read_note(note)
    if earlier is not None and earlier.digest == digest and path.exists():
        return earlier
    note.unlink(missing_ok=True)
    temporary = f"{path}.incomplete"
    try:
        datasets, size, bad = _write_rows(shard, temporary)
        os.replace(temporary, path)
        result = ShardResult(digest, name, datasets, size, tuple(bad))
        Path(f"{note}.incomplete").write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
        os.replace(f"{note}.incomplete", note)
    except (OSError, RuntimeError) as error:  # the writer raises RuntimeError
        for part in (temporary, f"{note}.incomplete"):
            Path(part).unlink(missing_ok=True)
        raise cannot_write(path, error, resume=True) from error
    return result


def _read_note(note: Path) -> ShardResult | None:
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        bad = tuple(Fault(**entry) for entry in content.pop("bad"))
        return ShardResult(**content, bad=bad)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_rows(shard: Shard, path: str) -> tuple[dict[str, int], int, list[Fault]]:
    """Writes the rows. Returns records per data set, bytes of all records, and the bad rows."""
    from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore[attr-defined]
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds_features()
    serialiser = ExampleSerializer(features.get_serialized_info())
    # Media are compressed already. Groups of one record make random reads cheap.
    writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    datasets: collections.Counter[str] = collections.Counter()
    size, bad = 0, []
    try:
        for row in shard.rows:
            example = row if isinstance(row, Fault) else _example(row, allow_outside=shard.allow_outside)
            if isinstance(example, Fault):
                bad.append(example)
                continue
            message = serialiser.get_tf_example(features.encode_example(example))
            record = message.SerializeToString(deterministic=True)  # type: ignore[attr-defined]
            writer.write(record)
            datasets[row.dataset] += 1
            size += len(record)
    finally:
        writer.close()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return dict(datasets), size, bad


def _example(row: Row, *, allow_outside: bool) -> dict[str, object] | Fault:
    """The values of the features of a row, or why a medium of it cannot be used."""
    names, values, counts, durations = [], [], [], []
    bytes_left = _MOST_BYTES
    for reference in row.media:
        try:
            with only_data_errors(row.root, reference):
                medium = open_media(row.root, reference, row.media_options, allow_outside=allow_outside)
                files = _read(medium, bytes_left)
                whole, inside = files[0], ""
                if kind_of(medium) == "folder":
                    whole, inside = medium._replace(pictures=files), FRAMES_PREFIX
                durations.append(probe_for(row, whole).duration)
        except DataError as error:
            return row.fault(error.fault)
        names += [inside + writable(os.path.basename(file.name or file.path)) for file in files]
        values += [file.data for file in files]
        counts.append(len(files))
        bytes_left -= sum(size_of(file) for file in files)
    fault = late_start(row, durations)
    if fault is not None:
        return fault
    start, end = row.bounds or (None, math.inf)
    return {
        "conversations": [{"role": turn.role, "content": turn.text} for turn in row.turns],
        "images": values if row.modality != "video" else [],
        "videos": values if row.modality == "video" else [],
        "media_names": names,
        "media_files": counts,
        "start": "" if start is None else repr(float(start)),
        "end": "" if end == math.inf else repr(float(end)),
        **{name: "" if value is None else repr(value) for name, value in row.media_options._asdict().items()},
        "dataset": row.dataset,
        "row": row.row,
    }


def _read(medium: Media, most_bytes: int) -> tuple[Media, ...]:
    """Reads a medium into memory; a folder of images one by one.

    Raises:
        DataError: it is larger than `most_bytes` ("too_large"), or cannot be read.
    """
    files = _files(medium)
    if sum(size_of(file) for file in files) > most_bytes:
        raise DataError(medium, "too_large", "is too large for a record of 2 GB; split or re-encode it")
    return tuple(_in_memory(file) for file in files)


def _files(medium: Media) -> list[PathOrMedia]:
    return [medium] if kind_of(medium) == "file" else list_pictures(medium)


def _in_memory(file: PathOrMedia) -> Media:
    medium = file if isinstance(file, Media) else Media(os.fspath(file))
    if medium.data is not None:
        return medium
    with open_file(medium) as opened:
        return medium._replace(data=opened.read())
