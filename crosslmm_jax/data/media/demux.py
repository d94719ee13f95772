"""Opening a video with PyAV and reading the packets of its video stream.

ffmpeg may use a short list of file formats and plain files only. No video can make it open another file or an
address: playlists, lists of files and numbered pictures are refused.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from crosslmm_jax.data.media.locate import (
    MAX_PIXELS,
    Deadline,
    PathOrMedia,
    check_pixels,
    kind_of,
    open_file,
    options_of,
    unreadable_reason,
    whole_file,
)
from crosslmm_jax.errors import DataError, UserError

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

SEEKABLE = ("mov", "matroska")  # formats in which ffmpeg finds keyframes exactly by their presentation times
DAMAGED = "is truncated or damaged; fetch or encode it again"
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,ivf,h264,hevc,obu,m4v,"
    "h263,nut,rm,mxf,dv,wtv,mjpeg,yuv4mpegpipe"
)


class Readable(Protocol):
    """What gives bytes, from front to back: an open file, a pipe, a file that grows."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...


@contextlib.contextmanager
def open_video(
    path: PathOrMedia, deadline: Deadline, num_threads: int = 1, *, live: "Readable | None" = None
) -> "Iterator[VideoStream]":
    """Opens a file and gives the video stream to read. Decoding errors inside become a DataError.

    With `live`, its bytes are read from there, from front to back, and `path` is for messages.
    """
    import av
    import av.error
    from av.stream import Discard

    if live is None and kind_of(path) == "folder":
        raise DataError(path, "not_a_file", "is a folder; give the path of a video")
    opened = False
    try:
        with contextlib.ExitStack() as stack:
            file = whole_file(path) if live is None else None
            opened_file = live or (stack.enter_context(open_file(path)) if file is None else f"file:{file}")
            options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
            if live is not None:
                # ffmpeg's own limits are 5 MB and 5 s of video, which would have to be waited for.
                options |= {"probesize": "250000", "analyzeduration": "500000"}
            container = stack.enter_context(av.open(
                # Without "file:" a name such as "concat:a|b" would be a protocol.
                opened_file,
                container_options=options,
                timeout=deadline.seconds,  # of each call
                **_metadata_options(),
            ))  # fmt: skip
            opened = True
            if live is not None and not len(container.streams):
                raise _not_live(path, None)
            stream = _video_stream(container, path)
            if format_of(stream) in SEEKABLE:  # other formats tell streams apart by their packets
                for other in container.streams:
                    other.discard = Discard.default if other is stream else Discard.all
            context = stream.codec_context
            stream.thread_type = "AUTO"  # type: ignore[assignment]
            context.thread_count = num_threads
            context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change within a stream
            yield stream
    except UserError:
        raise
    except av.error.ExitError as error:
        raise deadline.error() from error
    except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        if live is not None and not opened:
            raise _not_live(path, error) from error
        raise _open_error(path, error, opened) from error


def _metadata_options() -> dict[str, Any]:
    """Options with which `av.open` reads a file whose title is not UTF-8, which PyAV 18 refuses by default.

    PyAV 19 always reads it and has no such argument. `av.open` has no signature, so the container is asked.
    """
    from av.container import InputContainer

    return {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {}


def _video_stream(container: "InputContainer", path: PathOrMedia) -> "VideoStream":
    """The stream that `path` asks for, or the one that players show; never a cover or a thumbnail."""
    from av.stream import Disposition

    if not len(container.streams):
        raise DataError(path, unreadable_reason(path, "video"), DAMAGED)
    pictures = Disposition.attached_pic | Disposition.timed_thumbnails
    moving = (stream for stream in container.streams.video if not stream.disposition & pictures)
    streams = {stream.index: stream for stream in moving}
    if not streams:
        raise DataError(path, "no_video", "holds no video stream; give a file with moving pictures")
    wanted = options_of(path).stream
    if wanted is None:
        best = container.streams.best("video")
        wanted = best.index if best is not None else -1
        if wanted not in streams:  # ffmpeg may prefer the cover
            wanted = max(streams, key=lambda number: bool(streams[number].disposition & Disposition.default))
    elif wanted not in streams:
        known = ", ".join(map(str, streams))
        raise DataError(path, "no_video", f"stream {wanted} is no video; set stream to one of {known}")
    context = streams[wanted].codec_context
    if context is None:
        raise DataError(path, "wrong_type", "its video codec is unknown to ffmpeg; convert it to h264")
    check_pixels(path, context.width, context.height)
    return streams[wanted]


def _not_live(path: PathOrMedia, error: Exception | None) -> DataError:
    """The error for what is read from front to back, of which there is no file to look at."""
    words = getattr(error, "strerror", None) or "no stream is found"
    detail = f"cannot be read from front to back ({words}); write MPEG-TS, Matroska or fragmented mp4"
    return DataError(path, "corrupt", detail)


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


def format_of(stream: "VideoStream") -> str:
    """ffmpeg's first name for the file format: "mov" for the mp4 family, "matroska" for webm too."""
    return stream.container.format.name.partition(",")[0]


def container_of(stream: "VideoStream") -> "InputContainer":
    """The open file of a stream."""
    return cast("InputContainer", stream.container)


def packets_of(stream: "VideoStream") -> "Iterator[Packet]":
    """The packets of a video stream that are not empty."""
    return (packet for packet in _demux(stream) if packet.size)


def _demux(stream: "VideoStream") -> "Iterator[Packet]":
    while True:
        try:
            yield from container_of(stream).demux(stream)
            return
        except IndexError:
            # PyAV fails on the first packet of a stream that begins mid-file. The next call reads on.
            continue
