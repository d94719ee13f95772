"""The packets of a video stream: from the tables of an mp4 where they are complete, else by reading them."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.data.media.decoding import Timeline, Timestamps, lay_out, longest_gap, rising
from crosslmm_jax.data.media.demux import SEEKABLE, container_of, format_of, open_video, packets_of
from crosslmm_jax.data.media.locate import Deadline, PathOrMedia, open_file, size_of
from crosslmm_jax.data.media.mp4_tables import SampleTables, read_sample_tables
from crosslmm_jax.errors import DataError

if TYPE_CHECKING:
    from av import Packet
    from av.video.stream import VideoStream

KEEP_BYTES = 64 * 2**20  # the packets of a file up to this size are read once and kept
MOST_REPEATS = 16  # how often packets may refer to a byte of their file: an edit list can repeat a part
_MOST_TICKS = 2**44  # between first and last frame; times beyond are damaged
_WITHOUT_PRESENTATION = ("avi", "asf", "mxf")  # formats that store times of decoding only
_COMPARED = 1000  # samples of a long file that are compared with ffmpeg's list
_MOST_DELAYED = 64  # packets between decoding a frame and showing it
_NO_DURATION = "its frames have no duration (fps 0); encode it again"


@dataclasses.dataclass(frozen=True)
class PacketIndex:
    """The packets of a video stream in decoding order.

    Attributes:
        times: int64[n], time of each packet in ticks. They rise in order of display; see frame_times.
        stamps: int64[n], presentation times as the file has them, in ticks; those of `times` for a file
            without.
        keyframes: bool[n], as the file says.
        shown: bool[n], False for packets that an edit list hides. Other frames may reference them.
        end: tick at which the display of the last frame ends.
        tick: length of a tick in seconds.
        counted: the file has no presentation times. The frames of a GOP take the times of its packets in the
            order in which they are displayed.
        setups: int64[s], packets with a new description of the stream, which later packets need.
        packets: the packets, or None when the file is large or they were not read.
        seekable: ffmpeg finds keyframes of this file by their times.
        missing: number of packets that the file lists and does not hold.
        flagged: number of packets that ffmpeg calls damaged.
    """

    times: np.ndarray
    stamps: np.ndarray
    keyframes: np.ndarray
    shown: np.ndarray
    end: int
    tick: float
    counted: bool
    setups: np.ndarray
    packets: "list[Packet] | None"
    seekable: bool
    missing: int
    flagged: int

    @functools.cached_property
    def gops(self) -> np.ndarray:
        """int64[n], number of the GOP of each packet."""
        return np.maximum(np.cumsum(self.keyframes) - 1, 0)


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


@contextlib.contextmanager
def at_beginning(
    stream: "VideoStream", index: PacketIndex, path: PathOrMedia, deadline: Deadline, *, unless_sought: bool
) -> "Iterator[VideoStream]":
    """Gives a stream from which the packets of `index` can be read: `stream`, or the file opened again.

    Args:
        stream: was read to its end, unless the index comes from tables.
        index: of that stream; if it kept the packets, they need not be read.
        path: the file.
        deadline: for each packet.
        unless_sought: where keyframes are found by their times, `stream` can stay where it is.
    """
    if index.packets is not None or (unless_sought and index.seekable):
        yield stream
    else:
        threads = stream.codec_context.thread_count
        with open_video(path, deadline, threads) as again:
            yield again


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
    stamps = decode_times + tables.delays + (first.pts - first.dts - int(tables.delays[0]))
    tick = float(stream.time_base or 0)
    if last.pts != stamps[-1] or last.is_corrupt or not last.duration or not tick:
        return None
    span, count = int(stamps.max() - stamps.min()), len(stamps)
    if span > _MOST_TICKS or (1 < count and span < count) or len(np.unique(stamps)) < count:
        return None
    shown = np.ones(count, bool)
    durations = np.append(np.diff(decode_times), last.duration)
    timeline = _timeline(stream, Timestamps(stamps, decode_times, durations, shown), tick)
    return PacketIndex(
        times=timeline.times, stamps=stamps, keyframes=tables.keyframes, shown=shown, end=timeline.end,
        tick=tick, counted=False, setups=timeline.segments[1:], packets=None,
        seekable=len(timeline.segments) == 1, missing=0, flagged=0,
    )  # fmt: skip


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
        DataError: there are no packets, its packets do not end, or frames have no times.
    """
    read = _Reading(keep=size_of(path) <= KEEP_BYTES)
    bytes_left = MOST_REPEATS * size_of(path)
    for packet in _readable(packets_of(stream), read):
        deadline.check()
        bytes_left -= packet.size
        if bytes_left < 0:
            raise DataError(path, "corrupt", "lists more packets than it can hold; encode it again")
        read.add(packet)
    if not any(read.shown):
        if len({*read.presentation} - {None}) == 1 and stream.frames > 1:  # an edit list hides such frames
            raise DataError(path, "zero_fps", _NO_DURATION)
        raise DataError(path, "truncated", "its video stream holds no frames; fetch or encode it again")
    shown = np.array(read.shown)
    stamps, tick, counted = _stamps(read, stream, path)
    timeline = _timeline(stream, Timestamps(stamps, *read.decoding_stamps(stream, counted), shown), tick)
    return PacketIndex(
        times=timeline.times, stamps=stamps, keyframes=np.array(read.keyframes), shown=shown,
        end=timeline.end, tick=tick, counted=counted,
        setups=np.union1d(timeline.segments[1:], np.array(read.descriptions, np.int64)),
        packets=read.packets if read.keep else None,
        seekable=not counted and format_of(stream) in SEEKABLE and len(timeline.segments) == 1,
        missing=_missing(stream, len(stamps)), flagged=read.flagged,
    )  # fmt: skip


def _readable(packets: "Iterator[Packet]", read: "_Reading") -> "Iterator[Packet]":
    """The packets up to the place where ffmpeg cannot read on, which counts as a damaged packet."""
    import av.error

    try:
        yield from packets
    except av.error.FFmpegError as error:
        if isinstance(error, av.error.ExitError) or not read.shown:
            raise
        read.flagged += 1


def _missing(stream: "VideoStream", read: int) -> int:
    """Number of packets that the tables of the file list and that were not `read`."""
    if format_of(stream) != "mov" or len(stream.index_entries) <= read:
        return 0
    return max(0, sum(entry.size > 0 for entry in stream.index_entries) - read)


class _Reading:
    """What packets say, in the order in which they are read."""

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        self.packets: list[Packet] = []
        self.presentation: list[int | None] = []
        self.decoding: list[int | None] = []
        self.durations: list[int] = []
        self.keyframes: list[bool] = []
        self.shown: list[bool] = []
        self.descriptions: list[int] = []
        self.flagged = 0

    def add(self, packet: "Packet") -> None:
        """Notes the next packet."""
        if packet.has_sidedata("new_extradata"):
            self.descriptions.append(len(self.shown))
        if self.keep:
            self.packets.append(packet)
        self.presentation.append(packet.pts)
        self.decoding.append(packet.dts)
        self.durations.append(packet.duration or 0)
        self.keyframes.append(packet.is_keyframe)
        self.shown.append(not packet.is_discard)
        self.flagged += packet.is_corrupt

    def decoding_stamps(self, stream: "VideoStream", counted: bool) -> tuple[np.ndarray | None, np.ndarray]:
        """Decoding times, or None where the file has none, and durations: fields of `Timestamps`."""
        durations = np.array(self.durations, np.int64)
        if counted:
            return np.arange(len(durations)), np.zeros(len(durations), np.int64)
        # Matroska stores presentation times only. ffmpeg makes up the others, wrongly after a jump back.
        if format_of(stream) == "matroska" or None in self.decoding:
            return None, durations
        return np.array(self.decoding, np.int64), durations


def _timeline(stream: "VideoStream", stamps: Timestamps, tick: float) -> Timeline:
    rate = _rate(stream)
    return lay_out(
        stamps, reorders=stream.codec_context.codec.reorder, gap=round(1 / (rate * tick)) if rate else 1,
        longest_gap=longest_gap(format_of(stream), tick),
    )  # fmt: skip


def _rate(stream: "VideoStream") -> float:
    return float(stream.average_rate or stream.guessed_rate or stream.base_rate or 0)


def _stamps(read: _Reading, stream: "VideoStream", path: PathOrMedia) -> tuple[np.ndarray, float, bool]:
    """Presentation times int64[n], the length of a tick in seconds, and whether frames must be counted."""
    tick, rate, count = float(stream.time_base or 0), _rate(stream), len(read.shown)
    known = [time for time in read.presentation if time is not None]
    decoding = np.array([time for time in read.decoding if time is not None], np.int64)
    timed = bool(tick) and len(known) == count and max(known) - min(known) <= _MOST_TICKS
    # ffmpeg gives a frame without duration one tick. A tick above 1 ms can be a real duration.
    if timed and count > 1 and max(known) - min(known) < count and tick < 1e-3:
        raise DataError(path, "zero_fps", _NO_DURATION)
    if timed and not _are_of_decoding(np.array(known), decoding, stream):
        return np.array(known, np.int64), tick, False
    if timed and len(decoding) == count:
        return rising(decoding, gap=round(1 / (rate * tick)) if rate else 1), tick, True
    if not rate:
        raise DataError(path, "zero_fps", "has neither timestamps nor a frame rate; encode it again")
    return np.maximum(np.cumsum(read.shown) - 1, 0), 1 / rate, True


def _are_of_decoding(known: np.ndarray, decoding: np.ndarray, stream: "VideoStream") -> bool:
    """Whether the presentation times that ffmpeg gives are not those of presentation, but guesses."""
    format_name = format_of(stream)
    if format_name in _WITHOUT_PRESENTATION:  # they are those of decoding, which B-frames make wrong
        return bool(stream.codec_context.has_b_frames)
    if format_name == "matroska" or len(decoding) < len(known):
        return False
    rises, repeats = (np.diff(decoding) > 0).all(), len(np.unique(known)) < len(known)
    # An MPEG program stream has a timestamp where a packet begins, and several small frames share one.
    return bool(repeats and rises) or (format_name == "mpeg" and not rises)
