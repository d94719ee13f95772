"""Frames of a video that is still being written, or that comes through a pipe."""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crosslmm_jax.data.media.demux import Readable, open_video, packets_of
from crosslmm_jax.data.media.image import Resampling
from crosslmm_jax.data.media.locate import Deadline
from crosslmm_jax.data.media.to_square import ToSquare
from crosslmm_jax.errors import DataError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

_TOGETHER = 16  # most frames that are given at once
_LOOK_AGAIN_S = 0.05  # at a file that has not grown
_SAME_TIME = 1e-6  # seconds


class LiveFrames(NamedTuple):
    """Some frames of a video that goes on."""

    frames: np.ndarray  # uint8[n, R, R, 3]
    times: np.ndarray  # float32[n], seconds since the first frame of the video


class GrowingFile:
    """A file that is still written to: `read` waits for more bytes, and ends after `idle_s` without any.

    Attributes:
        caught_up: whether a `read` had to wait; set it to False to ask again later.
    """

    def __init__(self, path: str | os.PathLike[str], idle_s: float) -> None:
        """Opens the file. Raises DataError if that fails."""
        self._idle_s, self._ended, self.caught_up = idle_s, False, False
        try:
            self._file = open(path, "rb", buffering=0)
        except OSError as error:
            raise DataError(
                path, "missing", f"cannot be opened ({error.strerror}); correct the path"
            ) from error

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; none once nothing new came for `idle_s` seconds, and from then on."""
        until = time.monotonic() + self._idle_s
        while not self._ended:  # ffmpeg asks again at the end
            if data := self._file.read(size):
                return data
            self.caught_up, self._ended = True, time.monotonic() >= until
            time.sleep(0 if self._ended else _LOOK_AGAIN_S)
        return b""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Arriving:
    """What can be read from an open pipe or a growing file by now, instead of as much as was asked for.

    A buffered pipe would wait until it is full: for seconds, if little comes.
    """

    def __init__(self, source: Readable, name: str) -> None:
        self._read: Callable[[int], bytes | None] = getattr(source, "read1", source.read)
        self._name = name

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes; none at the end. Raises DataError if the pipe breaks."""
        try:
            while (data := self._read(size)) is None:  # nothing yet, in a pipe that does not wait
                time.sleep(_LOOK_AGAIN_S)
        except OSError as error:
            words = error.strerror or str(error) or type(error).__name__
            raise DataError(
                self._name, "truncated", f"breaks off ({words}); start what writes it again"
            ) from error
        return data


def follow(
    source: str | os.PathLike[str] | Readable, *, size: int, fps: float = 1.0, idle_s: float = 10.0,
    resampling: Resampling = "bicubic",
) -> Iterator[LiveFrames]:  # fmt: skip
    """Yields the frames on display at 0, 1 / fps, 2 / fps, ... seconds, soon after they are written.

    Formats that are readable from front to back while they are written: MPEG-TS, Matroska, fragmented mp4. An
    ordinary mp4 is not: its tables come last.

    Args:
        source: a file that grows, which ends when nothing new came for `idle_s` seconds; or an open pipe,
            which ends when its writer closes it.
        size: R, pixels of each side.
        fps: frames per second; a frame that is on display for longer is given once.
        idle_s: seconds.
        resampling: filter of the resizing.

    Raises:
        DataError: the file is missing, cannot be read from front to back or breaks off, or it holds no video
            or no frame that can be decoded.
    """
    if not 0 < fps < float("inf"):
        raise DataError(str(source), "other", f"fps is {fps}; it must be greater than 0")
    file: GrowingFile | None = None
    if isinstance(source, str | os.PathLike):
        live: Readable = (file := GrowingFile(source, idle_s))
    else:
        live = source
    name = str(source) if file is not None else str(getattr(source, "name", "pipe"))
    to_square, waiting, given = ToSquare(size, resampling, name, 1), [], False
    with contextlib.ExitStack() as stack:
        if file is not None:
            stack.callback(file.close)
        stream = stack.enter_context(open_video(name, Deadline(name, None), live=_Arriving(live, name)))
        for frame, seconds in _on_display(_timed(stream), fps):
            waiting.append((to_square(frame), seconds))
            given = True
            # What was written long ago is given in groups, what is new at once.
            if len(waiting) == _TOGETHER or file is None or file.caught_up:
                yield _joined(waiting)
                waiting = []
                if file is not None:
                    file.caught_up = False
        if waiting:
            yield _joined(waiting)
    if not given:
        raise DataError(name, "corrupt", "holds no frame that can be decoded; begin at a keyframe")


def _timed(stream: "VideoStream") -> "Iterator[tuple[VideoFrame, float]]":
    """Every frame that can be decoded, with seconds since the first one. Times that start again go on."""
    import av.error

    usual, tick = 1 / float(stream.average_rate or 25), float(stream.time_base or 1)
    offset, last = None, -usual
    for packet in itertools.chain(packets_of(stream), [None]):
        try:
            frames = stream.codec_context.decode(packet)
        except av.error.InvalidDataError:  # one damaged packet costs its frame
            continue
        for frame in frames:
            # The last frames, which the decoder held back, have no time base of their own.
            time = None if frame.pts is None else frame.pts * tick
            if offset is None and time is not None:
                offset = -time
            seconds = last + usual if time is None or offset is None else time + offset
            if seconds <= last:
                seconds = last + usual
                offset = None if time is None else seconds - time
            yield frame, seconds
            last = seconds


def _on_display(
    frames: "Iterator[tuple[VideoFrame, float]]", fps: float
) -> "Iterator[tuple[VideoFrame, float]]":
    """The last frame at or before each multiple of 1 / fps, once."""
    shown: tuple[VideoFrame, float] | None = None
    number = 0  # of the next multiple
    for following in frames:
        if shown is not None and following[1] - _SAME_TIME > number / fps:
            yield shown
            number = math.ceil((following[1] - _SAME_TIME) * fps)
        shown = following
    if shown is not None and shown[1] + _SAME_TIME >= number / fps:
        yield shown


def _joined(frames: list[tuple[np.ndarray, float]]) -> LiveFrames:
    images, seconds = zip(*frames, strict=True)
    return LiveFrames(np.stack(images), np.array(seconds, np.float32))
