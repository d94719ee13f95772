"""Decoding with PyAV: the wanted frames of a video as square uint8 pixels, and their times.

A first pass over the packets lists the time of every frame without decoding. The second decodes only the
groups of pictures that hold wanted frames, in order, and converts and resizes only the wanted ones.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.clip import Clip, Resampling, is_image, read_image, resize
from crosslmm_jax.data.sampling import choose_frames
from crosslmm_jax.errors import UserError

_MAX_PIXELS = 2**27  # of one frame; 16k video has 2**27
_KEEP_BYTES = 64 * 2**20  # packets of a file up to this size are read once and kept
_MOST_TICKS = 2**44  # between first and last frame; times beyond are damaged
_LOST_TAIL = 3  # frames at the end that may fail to decode before the file counts as damaged


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds: seconds, frames a second (mean), frames, and pixels as stored (before any turn)."""

    duration: float
    fps: float
    num_frames: int
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class _Index:
    """The packets of a video stream in decoding order.

    Attributes:
        times: int64[n], presentation time of each packet in ticks.
        groups: int64[n], which group of pictures a packet belongs to.
        needs_previous: bool[n], shown before its group's key frame, so that the group before is needed too.
        end: tick at which the last frame leaves the display.
        tick: seconds.
        by_order: the file carries no times; frames are told apart by their order.
        packets: the packets themselves, or None when the file is large.
    """

    times: np.ndarray
    groups: np.ndarray
    needs_previous: np.ndarray
    end: int
    tick: float
    by_order: bool
    packets: list[Any] | None


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Length, frame rate and size of a video, from its packets; nothing is decoded.

    Raises:
        UserError: no such file, no video in it, or damaged.
    """
    with _open(path) as (container, stream):
        index = _read_index(container, stream, path=path)
        duration = (index.end - int(index.times.min())) * index.tick
        frames = len(index.times)
        context = stream.codec_context
        return VideoInfo(duration, frames / duration, frames, context.width, context.height)


def read_frames(
    path: str | os.PathLike[str],
    sampling: SamplingConfig,
    *,
    size: int,
    bounds: tuple[float, float] | None = None,
    num_threads: int = 1,
    resampling: Resampling = "bicubic",
) -> Clip:
    """Reads the frames that `sampling` chooses, each resized to `size` x `size` as PIL does.

    Args:
        path: a video, or a still image, which is one frame at time 0.
        sampling: which frames.
        size: R, pixels along each side; the aspect ratio is not kept, as in SigLIP.
        bounds: seconds (start, end) of the part to read; None for all.
        num_threads: of the decoder; 0 lets it choose.
        resampling: of the resizing.

    Raises:
        UserError: no such file, no video in it, no frames within the bounds, or damaged.
    """
    if is_image(path):
        return read_image(path, size, resampling)
    shape: dict[str, Any] = {"size": size, "resampling": resampling}
    with _open(path, num_threads) as (container, stream):
        index = _read_index(container, stream, path=path)
        order = np.argsort(index.times, kind="stable")
        times = index.times[order]
        first, end = int(times[0]), index.end
        if bounds is not None:
            seconds = (times - first) * index.tick
            inside = (seconds >= bounds[0]) & (seconds < bounds[1])
            if not inside.any():
                raise UserError(
                    f"{path}: no frames between {bounds[0]} and {bounds[1]} seconds; mend start and end"
                )
            order, times = order[inside], times[inside]
            end = int(min(end, first + bounds[1] / index.tick))
        chosen = choose_frames(times, sampling, end=end, ticks_per_second=1 / index.tick)
        wanted = np.unique(chosen)
        if index.packets is not None:
            images = _decode(stream, index, wanted=order[wanted], path=path, **shape)
        else:
            with _open(path, num_threads) as (_, again):
                images = _decode(again, index, wanted=order[wanted], path=path, **shape)
    frames = images[np.searchsorted(wanted, chosen)]
    seconds = ((times[chosen] - first) * index.tick).astype(np.float32)
    return Clip(frames, seconds, (end - int(times[0])) * index.tick)


@contextlib.contextmanager
def _open(path: str | os.PathLike[str], num_threads: int = 1) -> Iterator[tuple[Any, Any]]:
    """Opens a file for its first video stream; turns every decoding error within into a UserError."""
    import av
    import av.error

    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; give the path of a video")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give the path of a video")
    try:
        with av.open(os.fspath(path)) as container:
            streams = [s for s in container.streams.video if not _is_cover(s)]
            if not streams:
                raise UserError(f"{path}: holds no video stream; give a file with moving pictures")
            stream = streams[0]
            context = stream.codec_context
            if context is None:
                raise UserError(f"{path}: its video codec is unknown to ffmpeg; convert it to h264")
            if context.width * context.height > _MAX_PIXELS:
                raise UserError(f"{path}: frames of {context.width} x {context.height} are too large to read")
            stream.thread_type = "AUTO"
            context.thread_count = num_threads
            yield container, stream
    except av.error.FFmpegError as error:
        raise UserError(
            f"{path}: cannot be decoded ({error.strerror}); replace or convert the file"
        ) from error


def _is_cover(stream: Any) -> bool:
    """Whether a stream is the cover picture of an audio file."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _read_index(container: Any, stream: Any, *, path: str | os.PathLike[str]) -> _Index:
    """Lists the packets of `stream`. Raises UserError when there are none or the file ends too early."""
    keep = os.path.getsize(path) <= _KEEP_BYTES
    packets, times, keys = [], [], []
    last_duration = 0
    for packet in container.demux(stream):
        if packet.size == 0 or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise UserError(f"{path}: is cut off or damaged; fetch or encode it again")
        packets.append(packet if keep else None)
        times.append(packet.pts)
        keys.append(packet.is_keyframe)
        last_duration = packet.duration or last_duration
    if not times:
        raise UserError(f"{path}: its video stream holds no frames; fetch or encode it again")
    tick = float(stream.time_base)
    known = [time for time in times if time is not None]
    by_order = len(known) < len(times) or max(known) - min(known) > _MOST_TICKS
    if by_order:
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        times, tick, last_duration = list(range(len(times))), 1 / rate, 1
    ticks = np.array(times, np.int64)
    gap = max(1, round((ticks.max() - ticks.min()) / max(len(ticks) - 1, 1)))
    groups = np.maximum(np.cumsum(keys) - 1, 0)
    key_times = ticks[np.maximum.accumulate(np.where(keys, np.arange(len(ticks)), 0))]
    return _Index(
        times=ticks,
        groups=groups,
        needs_previous=(ticks < key_times) & (groups > 0),
        end=int(ticks.max()) + (last_duration or gap),
        tick=tick,
        by_order=by_order,
        packets=packets if keep else None,
    )


def _decode(
    stream: Any,
    index: _Index,
    *,
    wanted: np.ndarray,
    size: int,
    resampling: Resampling,
    path: str | os.PathLike[str],
) -> np.ndarray:
    """Decodes the packets `wanted` (int[n], positions in decoding order, ascending in time).

    Returns:
        uint8[n, size, size, 3].
    """
    images = np.empty((len(wanted), size, size, 3), np.uint8)
    targets = index.times[wanted]
    done, last, seen = 0, None, 0
    for frame in _frames(stream, index, wanted=wanted):
        time = seen if index.by_order else frame.pts
        seen += 1
        last = frame
        first = done
        # A frame that was lost is replaced by the next one; in an intact file times match exactly.
        while time is not None and done < len(targets) and targets[done] <= time:
            done += 1
        if done > first:
            images[first:done] = _to_square(frame, size, resampling)
        if done == len(targets):
            return images
    tail = np.sort(index.times)[-min(_LOST_TAIL + 1, len(index.times)) :]
    if last is None or targets[done] < tail[0]:
        raise UserError(f"{path}: is cut off or damaged; fetch or encode it again")
    images[done:] = _to_square(last, size, resampling)
    return images


def _frames(stream: Any, index: _Index, *, wanted: np.ndarray) -> Iterator[Any]:
    """Decoded frames of the groups of pictures that hold the `wanted` packets, in order of display."""
    needed = set(index.groups[wanted].tolist())
    needed |= {group - 1 for group in index.groups[wanted[index.needs_previous[wanted]]].tolist()}
    if index.by_order:
        needed = set(index.groups.tolist())  # the count of frames must not skip any
    context = stream.codec_context
    final = max(needed)
    running = False
    packets = index.packets if index.packets is not None else _packets_again(stream)
    for packet, group in zip(packets, index.groups.tolist(), strict=False):
        if group in needed:
            yield from context.decode(packet)
            running = True
        elif running:
            yield from context.decode(None)
            context.flush_buffers()
            running = False
        if group > final:
            return
    if running:
        yield from context.decode(None)


def _packets_again(stream: Any) -> Iterator[Any]:
    """The packets of a large file, read a second time, skipping what `_read_index` skips."""
    for packet in stream.container.demux(stream):
        if packet.size and not packet.is_discard:
            yield packet


def _to_square(frame: Any, size: int, resampling: Resampling = "bicubic") -> np.ndarray:
    """uint8[size, size, 3] of a video frame, turned as its metadata says."""
    from PIL import Image

    pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4  # anticlockwise
    if quarter_turns:
        pixels = np.ascontiguousarray(np.rot90(pixels, quarter_turns))
    return resize(Image.fromarray(pixels), size, resampling)
