"""Opening a video with PyAV, and the list of its packets by reading them.

ffmpeg gets a short list of file formats and no protocol but plain files, so that no video makes it open
another file or an address: playlists, lists of files and numbered pictures are refused.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from crosslmm_jax.data.media.locate import (
    MAX_PIXELS,
    Deadline,
    PathOrMedia,
    check_pixels,
    kind_of,
    open_file,
    size_of,
    unreadable_reason,
    whole_file,
)
from crosslmm_jax.errors import DataError, UserError

KEEP_BYTES = 64 * 2**20  # packets of a file up to this size are read once and kept
SEEKABLE = ("mov", "matroska")  # formats in which ffmpeg finds key frames exactly, by their times
MOST_REPEATS = 16  # how often packets may name a byte of their file: an edit list can show a part again
MOST_TICKS = 2**44  # between first and last frame; times beyond are damaged
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,h264,hevc,obu,m4v,"
    "h263,nut,rm,mxf,dv,wtv,mjpeg,yuv4mpegpipe"
)
_NO_TIME = "its frames last no time (fps 0); encode it again"
_DAMAGED = "is cut off or damaged; fetch or encode it again"


@dataclasses.dataclass(frozen=True)
class PacketIndex:
    """The packets of a video stream in decoding order.

    Attributes:
        times: int64[n], presentation time of each packet in ticks.
        shown: bool[n], False for what an edit list hides: others may be made from it.
        groups: int64[n], which group of pictures a packet belongs to.
        needs_previous: bool[n], shown before its group's key frame, so that the group before is needed too.
        end: tick at which the last frame leaves the display.
        tick: seconds.
        by_order: the file carries no times; frames are told apart by their order.
        packets: the packets themselves, or None when the file is large or they were not read.
        seekable: ffmpeg finds key frames of this format by their times.
    """

    times: np.ndarray
    shown: np.ndarray
    groups: np.ndarray
    needs_previous: np.ndarray
    end: int
    tick: float
    by_order: bool
    packets: list[Any] | None
    seekable: bool


@contextlib.contextmanager
def open_video(path: PathOrMedia, deadline: Deadline, num_threads: int = 1) -> Iterator[Any]:
    """Opens a file and gives its first video stream; turns every decoding error within into a DataError."""
    import av
    import av.error
    from av.stream import Discard

    if kind_of(path) == "folder":
        raise DataError(path, "not_a_file", "is a folder; give the path of a video")
    opened = False
    try:
        with contextlib.ExitStack() as stack:
            file = whole_file(path)
            container = stack.enter_context(av.open(
                # "file:", or else a name such as "concat:a|b" would not be a file's.
                stack.enter_context(open_file(path)) if file is None else f"file:{file}",
                container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
                timeout=deadline.seconds,  # of each call
                **_metadata_options(),
            ))  # fmt: skip
            opened = True
            stream = _video_stream(container, path)
            if format_of(stream) in SEEKABLE:  # others are told apart by what their packets hold
                for other in container.streams:
                    other.discard = Discard.default if other is stream else Discard.all
            context = stream.codec_context
            stream.thread_type = "AUTO"
            context.thread_count = num_threads
            context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change on the way
            yield stream
    except UserError:
        raise
    except av.error.ExitError as error:
        raise deadline.error() from error
    except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise _open_error(path, error, opened) from error


def _metadata_options() -> dict[str, Any]:
    """Has `av.open` read a file whose title is not UTF-8: PyAV 18 refuses it unless told otherwise.

    PyAV 19 never does and has lost the argument. `av.open` has no signature to ask, its containers tell.
    """
    from av.container import InputContainer

    return {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {}


def _video_stream(container: Any, path: PathOrMedia) -> Any:
    from av.stream import Disposition

    covers = Disposition.attached_pic  # the cover picture of an audio file
    streams = [stream for stream in container.streams.video if not stream.disposition & covers]
    if not len(container.streams):
        raise DataError(path, unreadable_reason(path, "video"), _DAMAGED)
    if not streams:
        raise DataError(path, "no_video", "holds no video stream; give a file with moving pictures")
    context = streams[0].codec_context
    if context is None:
        raise DataError(path, "wrong_type", "its video codec is unknown to ffmpeg; convert it to h264")
    check_pixels(path, context.width, context.height)
    return streams[0]


def _open_error(path: PathOrMedia, error: Exception, opened: bool) -> DataError:
    """The error for one that ffmpeg raised while it opened a file, or after that (`opened`)."""
    import av.error

    if isinstance(error, MemoryError):
        reason = "too_large"
    elif opened:
        reason = "truncated" if isinstance(error, av.error.EOFError) else "corrupt"
    elif isinstance(error, av.error.PermissionError):
        reason = "other"
    else:
        reason = unreadable_reason(path, "video")
    words = getattr(error, "strerror", None) or type(error).__name__
    return DataError(path, reason, f"cannot be decoded ({words}); replace or convert the file")


def format_of(stream: Any) -> str:
    """The first of ffmpeg's names for the format of a file: "mov" of all of mp4's kin, "matroska" of webm."""
    return stream.container.format.name.partition(",")[0]


def grouped(times: np.ndarray, keys: np.ndarray) -> dict[str, np.ndarray]:
    """`groups` and `needs_previous` of a `PacketIndex`."""
    groups = np.maximum(np.cumsum(keys) - 1, 0)
    key_times = times[np.maximum.accumulate(np.where(keys, np.arange(len(times)), 0))]
    return {"groups": groups, "needs_previous": (times < key_times) & (groups > 0)}


def read_index(stream: Any, path: PathOrMedia, deadline: Deadline) -> PacketIndex:
    """Lists the packets of `stream`.

    Raises:
        DataError: there are none, the file ends too early, they do not end, or its frames have no times.
    """
    keep = size_of(path) <= KEEP_BYTES
    bytes_left = MOST_REPEATS * size_of(path)
    packets, times, keys, shown = [], [], [], []
    last_duration = 0
    for packet in packets_of(stream):
        deadline.check()
        if packet.is_corrupt:
            raise DataError(path, "truncated", _DAMAGED)
        bytes_left -= packet.size
        if bytes_left < 0:
            raise DataError(path, "corrupt", "names more packets than it can hold; encode it again")
        packets.append(packet if keep else None)
        times.append(packet.pts)
        keys.append(packet.is_keyframe)
        shown.append(not packet.is_discard)
        if shown[-1]:
            last_duration = packet.duration or last_duration
    if not any(shown):
        if len({*times} - {None}) == 1 and stream.frames > 1:  # an edit list hides what lasts no time
            raise DataError(path, "zero_fps", _NO_TIME)
        raise DataError(path, "truncated", "its video stream holds no frames; fetch or encode it again")
    rate = float(stream.average_rate or stream.guessed_rate or stream.base_rate or 0)
    ticks, tick, by_order = _ticks(times, float(stream.time_base or 0), rate, path)
    if by_order:
        ticks = np.maximum(np.cumsum(shown) - 1, 0)
    shown_ticks = ticks[shown]
    gap = round((shown_ticks.max() - shown_ticks.min()) / max(len(shown_ticks) - 1, 1))
    if not gap and rate:
        gap = round(1 / (rate * tick))
    return PacketIndex(
        times=ticks,
        shown=np.array(shown),
        end=int(shown_ticks.max()) + (1 if by_order else last_duration or max(1, gap)),
        tick=tick,
        by_order=by_order,
        packets=packets if keep else None,
        seekable=not by_order and format_of(stream) in SEEKABLE,
        **grouped(ticks, np.array(keys)),
    )


def packets_of(stream: Any) -> Iterator[Any]:
    """The packets of a video stream that are not empty."""
    return (packet for packet in _demux(stream) if packet.size)


def _demux(stream: Any) -> Iterator[Any]:
    while True:
        try:
            yield from stream.container.demux(stream)
            return
        except IndexError:
            # PyAV fails on the first packet of a stream that begins within the file; the next call reads on.
            continue


def _ticks(
    times: list[int | None], tick: float, rate: float, path: PathOrMedia
) -> tuple[np.ndarray, float, bool]:
    """Times as int64[n], the length of a tick, and whether they are numbers for want of times."""
    known = [time for time in times if time is not None]
    if tick and len(known) == len(times) and max(known) - min(known) <= MOST_TICKS:
        # ffmpeg mends a frame that lasts no time to a tick; a tick above 1 ms can be a real frame's.
        if len(known) > 1 and max(known) - min(known) < len(known) and tick < 1e-3:
            raise DataError(path, "zero_fps", _NO_TIME)
        return np.array(known, np.int64), tick, False
    if not rate:
        raise DataError(path, "zero_fps", "has neither times nor a frame rate; encode it again")
    return np.arange(len(times), dtype=np.int64), 1 / rate, True
