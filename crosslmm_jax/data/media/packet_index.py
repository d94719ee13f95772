"""The packets of a video stream: from the tables of an mp4 where they are complete, else by reading them."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.data.media.demux import DAMAGED, SEEKABLE, container_of, format_of, open_video, packets_of
from crosslmm_jax.data.media.locate import Deadline, PathOrMedia, open_file, size_of
from crosslmm_jax.data.media.mp4_tables import SampleTables, read_sample_tables
from crosslmm_jax.errors import DataError

if TYPE_CHECKING:
    from av import Packet
    from av.video.stream import VideoStream

KEEP_BYTES = 64 * 2**20  # the packets of a file up to this size are read once and kept
MOST_REPEATS = 16  # how often packets may refer to a byte of their file: an edit list can repeat a part
_MOST_TICKS = 2**44  # between first and last frame; times beyond are damaged
_COMPARED = 1000  # samples of a long file that are compared with ffmpeg's list
_MOST_DELAYED = 64  # packets between decoding a frame and showing it
_NO_DURATION = "its frames have no duration (fps 0); encode it again"


@dataclasses.dataclass(frozen=True)
class PacketIndex:
    """The packets of a video stream in decoding order.

    Attributes:
        times: int64[n], presentation time of each packet in ticks.
        keyframes: bool[n].
        shown: bool[n], False for packets that an edit list hides. Other frames may reference them.
        end: tick at which the display of the last frame ends.
        tick: length of a tick in seconds.
        untimed: the file carries no times; a packet's time is its number.
        packets: the packets, or None when the file is large or they were not read.
        seekable: ffmpeg finds keyframes of this format by their times.
    """

    times: np.ndarray
    keyframes: np.ndarray
    shown: np.ndarray
    end: int
    tick: float
    untimed: bool
    packets: "list[Packet] | None"
    seekable: bool

    @functools.cached_property
    def gops(self) -> np.ndarray:
        """int64[n], number of the GOP of each packet."""
        return np.maximum(np.cumsum(self.keyframes) - 1, 0)

    @functools.cached_property
    def needs_previous_gop(self) -> np.ndarray:
        """bool[n], shown before the keyframe of its GOP, as in an open GOP."""
        last_keyframe = np.where(self.keyframes, np.arange(len(self.times)), 0)
        return (self.times < self.times[np.maximum.accumulate(last_keyframe)]) & (self.gops > 0)


@contextlib.contextmanager
def open_indexed(
    path: PathOrMedia, deadline: Deadline, num_threads: int = 1, *, use_tables: bool = True
) -> "Iterator[tuple[VideoStream, PacketIndex]]":
    """Opens a file as `open_video` does. Gives its first video stream and the packets of that stream.

    Args:
        path: the file.
        deadline: checked for each packet.
        num_threads: threads of the decoder.
        use_tables: where the tables of the file are complete, take the list from them and read no packets.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_video(path, deadline, num_threads))
        index = None
        if use_tables and format_of(stream) == "mov":
            index = _index_from_tables(stream, path)
            if index is None:  # packets may have been read
                stream = stack.enter_context(open_video(path, deadline, num_threads))
        yield stream, index or read_index(stream, path, deadline)


def _index_from_tables(stream: "VideoStream", path: PathOrMedia) -> PacketIndex | None:
    """As `read_index`, if the tables agree with ffmpeg's list and with the first and the last packet.

    None if they do not. The packets must then be read.
    """
    import av.error

    with open_file(path) as file:
        tables = read_sample_tables(file, size_of(path), stream.id)
    if tables is None or tables.sizes.sum() > MOST_REPEATS * size_of(path):
        return None
    if not _agree(tables, stream):
        return None
    decode_times = tables.decode_times + stream.index_entries[0].timestamp
    try:
        first = next(packets_of(stream))
        container_of(stream).seek(int(decode_times[-1]), stream=stream, any_frame=True)
        near_end = itertools.islice(packets_of(stream), _MOST_DELAYED)
        last = next(packet for packet in near_end if packet.dts == decode_times[-1])
    except (StopIteration, av.error.FFmpegError):
        return None
    if first.pts is None or first.dts is None or last.pts is None:
        return None
    if first.dts != decode_times[0] or not first.is_keyframe:
        return None
    # ffmpeg shifts all times by one amount, for the edit list and for negative delays.
    times = decode_times + tables.delays + (first.pts - first.dts - int(tables.delays[0]))
    tick = float(stream.time_base or 0)
    if last.pts != times[-1] or last.is_corrupt or not last.duration or not tick:
        return None
    span, count = int(times.max() - times.min()), len(times)
    if span > _MOST_TICKS or (1 < count and span < count):
        return None
    return PacketIndex(
        times=times,
        keyframes=tables.keyframes,
        shown=np.ones(count, bool),
        end=int(times.max()) + last.duration,
        tick=tick,
        untimed=False,
        packets=None,
        seekable=True,
    )


def _agree(tables: SampleTables, stream: "VideoStream") -> bool:
    """Whether ffmpeg lists the same samples and shows them all. Of long lists a part is compared."""
    entries, count = stream.index_entries, len(tables.keyframes)
    if len(entries) != count or not tables.sizes.all():
        return False
    start = entries[0].timestamp
    inner = np.linspace(0, count - 1, min(count, _COMPARED))
    ends = [*range(min(count, _MOST_DELAYED)), *range(max(0, count - _MOST_DELAYED), count)]
    for number in np.union1d(inner.astype(int), ends).tolist():
        entry = entries[number]
        if (
            entry.timestamp - start != tables.decode_times[number]
            or entry.is_keyframe != tables.keyframes[number]
            or entry.size != tables.sizes[number]
            or entry.is_discard
        ):
            return False
    return True


def read_index(stream: "VideoStream", path: PathOrMedia, deadline: Deadline) -> PacketIndex:
    """Reads all packets of `stream`.

    Raises:
        DataError: there are no packets, the file ends too early, its packets do not end, or frames have no
            times.
    """
    keep = size_of(path) <= KEEP_BYTES
    bytes_left = MOST_REPEATS * size_of(path)
    packets, times, keyframes, shown = [], [], [], []
    last_duration = 0
    for packet in packets_of(stream):
        deadline.check()
        if packet.is_corrupt:
            raise DataError(path, "truncated", DAMAGED)
        bytes_left -= packet.size
        if bytes_left < 0:
            raise DataError(path, "corrupt", "lists more packets than it can hold; encode it again")
        packets.append(packet if keep else None)
        times.append(packet.pts)
        keyframes.append(packet.is_keyframe)
        shown.append(not packet.is_discard)
        if shown[-1]:
            last_duration = packet.duration or last_duration
    if not any(shown):
        if len({*times} - {None}) == 1 and stream.frames > 1:  # an edit list hides frames without duration
            raise DataError(path, "zero_fps", _NO_DURATION)
        raise DataError(path, "truncated", "its video stream holds no frames; fetch or encode it again")
    rate = float(stream.average_rate or stream.guessed_rate or stream.base_rate or 0)
    ticks, tick, untimed = _ticks(times, float(stream.time_base or 0), rate, path)
    if untimed:
        ticks = np.maximum(np.cumsum(shown) - 1, 0)
    shown_ticks = ticks[shown]
    gap = round((shown_ticks.max() - shown_ticks.min()) / max(len(shown_ticks) - 1, 1))
    if not gap and rate:
        gap = round(1 / (rate * tick))
    return PacketIndex(
        times=ticks,
        keyframes=np.array(keyframes),
        shown=np.array(shown),
        end=int(shown_ticks.max()) + (1 if untimed else last_duration or max(1, gap)),
        tick=tick,
        untimed=untimed,
        packets=packets if keep else None,
        seekable=not untimed and format_of(stream) in SEEKABLE,
    )


def _ticks(
    times: list[int | None], tick: float, rate: float, path: PathOrMedia
) -> tuple[np.ndarray, float, bool]:
    """Times as int64[n], the length of a tick in seconds, and whether packet numbers stand in for times."""
    known = [time for time in times if time is not None]
    if tick and len(known) == len(times) and max(known) - min(known) <= _MOST_TICKS:
        # ffmpeg gives a frame without duration one tick. A tick above 1 ms can be a real duration.
        if len(known) > 1 and max(known) - min(known) < len(known) and tick < 1e-3:
            raise DataError(path, "zero_fps", _NO_DURATION)
        return np.array(known, np.int64), tick, False
    if not rate:
        raise DataError(path, "zero_fps", "has neither timestamps nor a frame rate; encode it again")
    return np.arange(len(times), dtype=np.int64), 1 / rate, True
