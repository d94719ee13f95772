"""Media in the records of ArrayRecord files, read by random access.

    reference                            the medium is
    a.array_record::17                   record 17
    a.array_record::17/video/0.mp4       value 0 of the feature `video` of record 17
    a.array_record::17/frames/0-9.png    a video whose pictures are the values 0 to 9 of `frames`

Records with features are tf.train.Examples, as TensorFlow Datasets writes them.
"""

import functools
import os
import re
import stat
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crosslmm_jax.errors import DataError

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordReader  # type: ignore[attr-defined]

_MEMBER = re.compile(r"(\d{1,18})(?:/(.+?)/(\d{1,9})(?:-(\d{1,9}))?(\.\w+)?)?", re.DOTALL)
FRAMES_PREFIX = "frames/"  # before the names of pictures that are the frames of one video
_KEPT_READERS = 128  # open files of a process
# One record at a time: no read-ahead, and no threads, which a fork would lose.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0,footer_prefetch_bytes:64K"
_BUFFER_BYTES = 32768
_LOADING = threading.Lock()
_LAST = threading.local()  # `record`: reader, number and values of the record that a thread reads from


def is_record_file(path: str) -> bool:
    """Whether the name is that of an ArrayRecord file, such as "a.array_record-00000-of-00010"."""
    return ".array_record" in os.path.basename(path)


def value_member(record: int, feature: str, first: int, last: int, suffix: str, *, pictures: bool) -> str:
    """The part after "::" for values `first` to `last` of a feature: a medium, or the pictures of a video."""
    values = f"{first}-{last}" if pictures else str(first)
    return f"{record}/{feature}/{values}{suffix}"


def read_values(path: str, member: str) -> tuple[list[bytes], str, bool]:
    """The content at a reference, its suffix or "", and whether it is the pictures of a video.

    Args:
        path: an ArrayRecord file.
        member: the part after "::" of the reference.

    Raises:
        DataError: as `read_record`; also "missing" when the record holds no such value.
    """
    match = _MEMBER.fullmatch(member)
    if match is None:
        fix = 'write the number of a record, or "RECORD/FEATURE/NUMBER"'
        raise DataError(f"{path}::{member}", "missing", f"names no record; {fix}")
    number, feature, first, last, suffix = match.groups()
    if feature is None:
        return [read_record(path, int(number))], "", False
    reader, record = _open(path), int(number)
    kept = getattr(_LAST, "record", None)
    if kept is None or kept[0] is not reader or kept[1] != record:
        kept = reader, record, parse_example(read_record(path, record), f"{path}::{number}")
    values = kept[2].get(feature, ())
    begin, end = int(first), int(last or first) + 1
    _LAST.record = kept if end < len(values) else None
    found = list(values[begin:end])
    if len(found) != end - begin or not found or not all(isinstance(value, bytes) for value in found):
        fix = "the data set has changed; index it again"
        raise DataError(f"{path}::{member}", "missing", f"the record holds no such medium; {fix}")
    return found, suffix or "", last is not None


def read_record(path: str, number: int) -> bytes:
    """Record `number` of an ArrayRecord file.

    Raises:
        DataError: there is no such file or record ("missing"), or it cannot be read ("corrupt", "other",
            "not_a_file").
    """
    reader = _open(path)
    fix = "write or download the file again"
    if number >= reader.num_records():
        raise DataError(path, "missing", f"holds no record {number}; index the data set again")
    try:
        return reader.read([number])[0]
    except RuntimeError as error:
        words = str(error).split(";")[0]
        raise DataError(path, "corrupt", f"record {number} cannot be read ({words}); {fix}") from error


def mean_record_size(path: str) -> int:
    """Mean bytes per record of the file. Raises DataError as `read_record` does."""
    return os.path.getsize(path) // max(1, _open(path).num_records())


def _open(path: str) -> "ArrayRecordReader":
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise DataError(path, "missing", "no such file; write or download it again") from error
    except OSError as error:
        raise DataError(path, "other", f"cannot be read ({error.strerror}); correct the path") from error
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
        raise DataError(path, "not_a_file", "is no regular file; write or download it again")
    reader = _reader(path, found.st_size, found.st_mtime_ns)
    if not reader.ok():
        fix = "write or download the file again"
        raise DataError(path, "corrupt", f"is no intact ArrayRecord file; {fix}")
    return reader


@functools.lru_cache(maxsize=_KEPT_READERS)
def _reader(path: str, size: int, mtime: int) -> "ArrayRecordReader":
    """A reader of a file, kept open. `size` and `mtime` are part of the cache key, for files that change.

    Several threads may use it. It closes with its last reference.
    """
    from array_record.python.array_record_module import ArrayRecordReader  # type: ignore[attr-defined]

    return ArrayRecordReader(path, _OPTIONS, file_reader_buffer_size=_BUFFER_BYTES)


# Our workers are spawned. Where someone forks, the child opens its own files.
os.register_at_fork(after_in_child=_reader.cache_clear)


def _example_type() -> Any:
    """The class tf.train.Example. TensorFlow Datasets imports its modules at first use.

    Two threads that import them at once can deadlock, hence the lock.
    """
    with _LOADING:
        from tensorflow_datasets.proto import tf_example_pb2

        return tf_example_pb2.Example  # type: ignore[attr-defined]


def parse_example(record: bytes, where: str) -> Mapping[str, Sequence[Any]]:
    """Values of each feature of a tf.train.Example: bytes, ints or floats. Nested features are named "a/b".

    Raises:
        DataError: "corrupt", if `record` is no tf.train.Example.
    """
    from google.protobuf.message import DecodeError

    try:
        features = _example_type().FromString(record).features.feature
    except DecodeError as error:
        fix = "write the data set with TensorFlow Datasets"
        raise DataError(where, "corrupt", f"is no tf.train.Example; {fix}") from error
    values = {}
    for name, feature in features.items():
        kind = feature.WhichOneof("kind")
        values[name] = getattr(feature, kind).value if kind else ()
    return values
