"""Times and keyframes of all frames of an mp4 or mov file from its tables, without reading the frames.

Tables of ISO/IEC 14496-12, section 8:

    stts  duration of each sample, in decoding order
    ctts  delay from decoding to presentation
    stss  numbers of the keyframes
    stsz  sizes in bytes

ffmpeg reads the same tables, but gives presentation times only for packets that were read.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

_MOST_BYTES = 2**27  # of the tables of all tracks; an hour of video and sound takes about 3 MiB
_MOST_BOXES = 10_000  # at the top level of a file; a fragmented file has many
_MOST_SAMPLES = 2**23  # 93 hours at 25 frames per second
_CHANGING = {b"stps", b"stz2"}  # rare tables with another meaning


class SampleTables(NamedTuple):
    """The samples of a track in decoding order.

    Attributes:
        decode_times: int64[n], ticks since the first sample, before any edit list.
        delays: int64[n], ticks from decoding to presentation.
        keyframes: bool[n].
        sizes: int64[n], bytes.
    """

    decode_times: np.ndarray
    delays: np.ndarray
    keyframes: np.ndarray
    sizes: np.ndarray


def read_sample_tables(file: BinaryIO, size: int, track_id: int) -> SampleTables | None:
    """The tables of a track, or None when they are incomplete or damaged.

    They are incomplete in fragmented files, with edit lists of several parts, and if the codec changes.

    Args:
        file: the file, open for reading and seeking.
        size: bytes of the file.
        track_id: ffmpeg's `stream.id`.
    """
    try:
        movie = _read_movie(file, size)
        if movie is None or _find(movie, b"mvex") is not None:
            return None
        for kind, track in _boxes(movie):
            if kind == b"trak" and _track_id(track) == track_id:
                return _tables(track)
    except (ValueError, KeyError, IndexError, struct.error):
        pass  # damaged: the caller reads the packets instead
    return None


def _read_movie(file: BinaryIO, size: int) -> memoryview | None:
    """Content of the "moov" box, or None."""
    place = 0
    for _ in range(_MOST_BOXES):
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return None
        length, kind = struct.unpack_from(">I4s", head)
        skip = 8
        if length == 1:
            length, skip = struct.unpack_from(">Q", head, 8)[0], 16
        if kind == b"moov":
            if not skip < length <= min(_MOST_BYTES, size - place):
                return None
            file.seek(place + skip)
            return memoryview(file.read(length - skip))
        if length < skip:  # 0 means up to the end of the file
            return None
        place += length
    return None


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and content of each box in `data`. Raises ValueError where a box exceeds it."""
    place = 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if not 8 <= length <= len(data) - place:
            raise ValueError(kind)
        yield kind, data[place + 8 : place + length]
        place += length


def _find(data: memoryview, *path: bytes) -> memoryview | None:
    """Content of the first box at `path` (kinds from outer to inner), or None."""
    for wanted in path:
        found = next((content for kind, content in _boxes(data) if kind == wanted), None)
        if found is None:
            return None
        data = found
    return data


def _track_id(track: memoryview) -> int | None:
    header = _find(track, b"tkhd")
    if header is None:
        return None
    return struct.unpack_from(">I", header, 20 if header[0] == 1 else 12)[0]


def _tables(track: memoryview) -> SampleTables | None:
    table = _find(track, b"mdia", b"minf", b"stbl")
    if table is None or not _is_one_edit(_find(track, b"edts", b"elst")):
        return None
    boxes = dict(_boxes(table))
    groups = {bytes(content[4:8]) for kind, content in _boxes(table) if kind == b"sbgp"}
    if _CHANGING & boxes.keys() or groups & {b"rap ", b"sync"} or _entries(boxes[b"stsd"]) != 1:
        return None
    same_size, count = struct.unpack_from(">II", boxes[b"stsz"], 4)
    if not 0 < count <= _MOST_SAMPLES:
        return None
    if same_size:  # as of a single frame
        sizes = np.full(count, same_size, np.int64)
    else:
        sizes = np.frombuffer(boxes[b"stsz"], ">u4", count, 12).astype(np.int64)
    lasts = _runs(boxes[b"stts"], ">u4", count)
    keyframes = np.ones(count, bool)
    if b"stss" in boxes:
        keyframes[:] = False
        keyframes[np.frombuffer(boxes[b"stss"], ">u4", _entries(boxes[b"stss"]), 8).astype(np.int64) - 1] = (
            True
        )
    delays = _runs(boxes[b"ctts"], ">i4", count) if b"ctts" in boxes else np.zeros(count, np.int64)
    return SampleTables(np.cumsum(lasts) - lasts, delays, keyframes, sizes)


def _is_one_edit(edits: memoryview | None) -> bool:
    """Whether an edit list (None: there is none) shows one part of the track, perhaps after a pause."""
    if edits is None:
        return True
    form, step = (">Qq4x", 20) if edits[0] == 1 else (">Ii4x", 12)
    parts = [struct.unpack_from(form, edits, 8 + step * number) for number in range(min(_entries(edits), 3))]
    return 1 <= len(parts) <= 2 and all(start == -1 for _, start in parts[:-1]) and parts[-1][1] >= 0


def _entries(box: memoryview) -> int:
    return struct.unpack_from(">I", box, 4)[0]


def _runs(box: memoryview, value: str, count: int) -> np.ndarray:
    """int64[count] from a run-length table of (samples, value). Raises ValueError at another length."""
    pairs = np.frombuffer(box, np.dtype([("count", ">u4"), ("value", value)]), _entries(box), 8)
    if pairs["count"].sum(dtype=np.int64) != count:
        raise ValueError(count)
    return np.repeat(pairs["value"].astype(np.int64), pairs["count"].astype(np.int64))
