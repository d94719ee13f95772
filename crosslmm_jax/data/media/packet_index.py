"""The list of a video's packets, from the tables of an mp4 where they tell all, else from the packets."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from crosslmm_jax.data.media.demux import (
    MOST_REPEATS,
    MOST_TICKS,
    PacketIndex,
    format_of,
    grouped,
    open_video,
    packets_of,
    read_index,
)
from crosslmm_jax.data.media.locate import Deadline, PathOrMedia, open_file, size_of
from crosslmm_jax.data.media.mp4_tables import SampleTables, read_sample_tables

_COMPARED = 1000  # samples of a long file that are looked up in ffmpeg's own list
_MOST_DELAYED = 64  # packets between decoding a frame and showing it


@contextlib.contextmanager
def open_indexed(
    path: PathOrMedia, deadline: Deadline, num_threads: int = 1, *, use_tables: bool = True
) -> Iterator[tuple[Any, PacketIndex]]:
    """Opens a file, as `open_video`; gives its first video stream and the list of the packets of that.

    Args:
        path: of the file.
        deadline: checked for each packet.
        num_threads: of the decoder.
        use_tables: take the list from the file's tables where they tell all of it, without reading packets.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_video(path, deadline, num_threads))
        index = None
        if use_tables and format_of(stream) == "mov":
            index = _index_from_tables(stream, path)
            if index is None:  # packets may have been read
                stream = stack.enter_context(open_video(path, deadline, num_threads))
        yield stream, index or read_index(stream, path, deadline)


def _index_from_tables(stream: Any, path: PathOrMedia) -> PacketIndex | None:
    """As `read_index`, if the file's tables agree with ffmpeg's list and with its first and last packet.

    None when they do not; then the packets must be read.
    """
    import av.error

    with open_file(path) as file:
        tables = read_sample_tables(file, size_of(path), stream.id)
    if tables is None or tables.sizes.sum() > MOST_REPEATS * size_of(path):
        return None
    if not _agree(tables, stream.index_entries):
        return None
    decode_times = tables.decode_times + stream.index_entries[0].timestamp
    try:
        first = next(packets_of(stream))
        stream.container.seek(int(decode_times[-1]), stream=stream, any_frame=True)
        near_end = itertools.islice(packets_of(stream), _MOST_DELAYED)
        last = next(packet for packet in near_end if packet.dts == decode_times[-1])
    except (StopIteration, av.error.FFmpegError):
        return None
    if first.dts != decode_times[0] or not first.is_keyframe or None in (first.pts, last.pts):
        return None
    # ffmpeg moves all times together, for the edit list and for delays below zero.
    times = decode_times + tables.delays + (first.pts - first.dts - int(tables.delays[0]))
    tick = float(stream.time_base or 0)
    if last.pts != times[-1] or last.is_corrupt or not last.duration or not tick:
        return None
    span, count = int(times.max() - times.min()), len(times)
    if span > MOST_TICKS or (1 < count and span < count):
        return None
    return PacketIndex(
        times=times,
        shown=np.ones(count, bool),
        end=int(times.max()) + last.duration,
        tick=tick,
        by_order=False,
        packets=None,
        seekable=True,
        **grouped(times, tables.keys),
    )


def _agree(tables: SampleTables, entries: Any) -> bool:
    """Whether ffmpeg lists the same samples and shows them all; of long lists some are compared."""
    count = len(tables.keys)
    if len(entries) != count or not tables.sizes.all():
        return False
    start = entries[0].timestamp
    inner = np.linspace(0, count - 1, min(count, _COMPARED))
    ends = [*range(min(count, _MOST_DELAYED)), *range(max(0, count - _MOST_DELAYED), count)]
    for number in np.union1d(inner.astype(int), ends).tolist():
        entry = entries[number]
        if (
            entry.timestamp - start != tables.decode_times[number]
            or entry.is_keyframe != tables.keys[number]
            or entry.size != tables.sizes[number]
            or entry.is_discard
        ):
            return False
    return True
