"""The wanted frames of a video as square uint8 pixels, and their times; what a video is like.

First the times of all frames are listed without decoding: from the tables of an mp4, or from all packets.
Then only the groups of pictures that hold wanted frames are read and decoded, each up to its last wanted one,
and only the wanted ones are converted and resized. Folders of pictures and still images are read by the same
functions.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.decode import SeekError, can_seek, decode_gops
from crosslmm_jax.data.media.demux import SEEKABLE, PacketIndex, format_of, open_video
from crosslmm_jax.data.media.frame_sampling import choose_frames
from crosslmm_jax.data.media.frames_folder import list_pictures, read_pictures
from crosslmm_jax.data.media.image import Clip, Resampling, holds_image, open_image, read_image, resize
from crosslmm_jax.data.media.locate import DEADLINE_S, Deadline, PathOrMedia, check_pixels, kind_of, size_of
from crosslmm_jax.data.media.packet_index import open_indexed
from crosslmm_jax.errors import DataError

_LOST_TAIL = 3  # frames at the end that may fail to decode before the file counts as damaged
_EXIF_ROTATION = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}  # degrees anticlockwise
_ORIENTATION = 0x0112  # number of the field in the EXIF data


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds.

    Attributes:
        duration: seconds; 0 for a still image.
        fps: mean frames a second; 0 for a still image.
        num_frames: 1 for a still image.
        width: pixels as stored, before any turn.
        height: likewise.
        size_bytes: of the file, or of all pictures of a folder.
        codec: ffmpeg's name of the codec, or PIL's of the image format in lower case.
        keyframe_spacing: mean seconds from one key frame to the next; 0 for a still image.
        rotation: degrees anticlockwise by which to turn the stored picture: 0, 90, 180 or 270.
    """

    duration: float
    fps: float
    num_frames: int
    width: int
    height: int
    size_bytes: int
    codec: str
    keyframe_spacing: float
    rotation: int


def probe(path: PathOrMedia, *, deadline_s: float | None = DEADLINE_S) -> VideoInfo:
    """Length, frame rate and size of a video, from its tables or packets; at most its first frame is decoded.

    Of pictures, those of a folder too, the headers are read: damage behind them shows when they are decoded.

    Args:
        path: a video, a folder of its frames, or a still image; a path or what `open_media` gives.
        deadline_s: seconds without a packet or picture after which it fails; None for no limit.

    Raises:
        DataError: no such file, no video in it, or damaged.
    """
    deadline = Deadline(path, deadline_s)
    if kind_of(path) == "folder":
        infos = []
        for picture in list_pictures(path):
            deadline.check()
            infos.append(_probe_image(picture))
        return dataclasses.replace(
            infos[0],
            duration=float(len(infos)),
            fps=1.0,
            num_frames=len(infos),
            size_bytes=sum(info.size_bytes for info in infos),
            keyframe_spacing=1.0,
        )
    if holds_image(path):
        return _probe_image(path)
    with open_indexed(path, deadline) as (stream, index):
        duration = (index.end - int(index.times[index.shown].min())) * index.tick
        frames = int(index.shown.sum())
        context = stream.codec_context
        return VideoInfo(
            duration=duration,
            fps=frames / duration,
            num_frames=frames,
            width=context.width,
            height=context.height,
            size_bytes=size_of(path),
            codec=context.codec.canonical_name,
            keyframe_spacing=duration / (int(index.groups.max()) + 1),
            rotation=_first_rotation(stream, index, deadline),
        )


def _probe_image(path: PathOrMedia) -> VideoInfo:
    """Size and format of a still image, from its header alone."""
    with open_image(path) as image:
        rotation = _EXIF_ROTATION.get(image.getexif().get(_ORIENTATION, 1), 0)
        return VideoInfo(
            duration=0.0, fps=0.0, num_frames=1, width=image.width, height=image.height,
            size_bytes=size_of(path), codec=image.format.lower(), keyframe_spacing=0.0,
            rotation=rotation,
        )  # fmt: skip


def _first_rotation(stream: Any, index: PacketIndex, deadline: Deadline) -> int:
    """Rotation of the first frame; PyAV tells it of frames only. 0 where that frame is damaged."""
    import av.error

    if format_of(stream) not in SEEKABLE:
        return 0  # other formats carry none
    first = np.flatnonzero(index.shown)[:1]
    with contextlib.suppress(av.error.InvalidDataError, SeekError):
        for frame in decode_gops(stream, index, wanted=first, shortcuts=True, deadline=deadline):
            return _quarter_turns(frame) * 90
    return 0


def read_frames(
    path: PathOrMedia,
    sampling: SamplingConfig,
    *,
    size: int,
    bounds: tuple[float, float] | None = None,
    num_threads: int = 1,
    resampling: Resampling = "bicubic",
    deadline_s: float | None = DEADLINE_S,
) -> Clip:
    """Reads the frames that `sampling` chooses, each resized to `size` x `size` as PIL does.

    Args:
        path: a video, a folder of its frames (one a second), or a still image, which is one frame at time 0;
            a path or what `open_media` gives.
        sampling: which frames.
        size: R, pixels along each side; the aspect ratio is not kept, as in SigLIP.
        bounds: seconds (start, end) of the part to read; None for all.
        num_threads: of the decoder; 0 lets it choose.
        resampling: of the resizing.
        deadline_s: seconds without a packet or picture after which it fails; None for no limit.

    Raises:
        DataError: no such file, no video in it, no frames within the bounds, damaged, or at a stand.
    """
    deadline = Deadline(path, deadline_s)
    if kind_of(path) == "folder":
        pictures = list_pictures(path)
        part = _select(
            np.arange(len(pictures)), sampling, end=len(pictures), tick=1.0, bounds=bounds, path=path
        )
        images = read_pictures(
            [pictures[number] for number in part.wanted], size=size, resampling=resampling, deadline=deadline
        )
        return part.clip(images)
    if holds_image(path):
        return read_image(path, size, resampling)
    to_square = _Squarer(size, resampling, path)
    for shortcuts in (True, False):  # what shortcuts do not find is read without
        with open_indexed(path, deadline, num_threads, use_tables=shortcuts) as (stream, index):
            shown = np.flatnonzero(index.shown)
            part = _select(
                index.times[shown], sampling, end=index.end, tick=index.tick, bounds=bounds, path=path
            )
            wanted = shown[part.wanted]
            for whole_groups in (False,) if shortcuts else (False, True):
                with contextlib.ExitStack() as stack:
                    source = stream
                    if index.packets is None and not (shortcuts and can_seek(index)):
                        source = stack.enter_context(open_video(path, deadline, num_threads))
                    frames = decode_gops(
                        source, index, wanted=wanted, whole_groups=whole_groups, shortcuts=shortcuts,
                        deadline=deadline,
                    )  # fmt: skip
                    images = _pick(frames, index, wanted=wanted, to_square=to_square, exact=shortcuts)
                if images is not None:
                    return part.clip(images)
    raise DataError(path, "truncated", "is cut off or damaged; fetch or encode it again")


@dataclasses.dataclass(frozen=True)
class _Selection:
    """The frames to read: `wanted` positions without repeats, ascending in time; the clip may repeat them."""

    wanted: np.ndarray
    repeats: np.ndarray
    seconds: np.ndarray
    duration: float

    def clip(self, images: np.ndarray) -> Clip:
        """The clip of the `wanted` images, uint8[n, R, R, 3]."""
        if len(self.repeats) > len(images):  # without repeats this would be a copy of the same, and large
            images = images[self.repeats]
        return Clip(images, self.seconds, self.duration)


def _select(
    times: np.ndarray, sampling: SamplingConfig, *, end: float, tick: float,
    bounds: tuple[float, float] | None, path: PathOrMedia,
) -> _Selection:  # fmt: skip
    """Applies bounds and sampling to the times (ticks, in any order) of a video's frames."""
    order = np.argsort(times, kind="stable")
    times = times[order]
    first = int(times[0])
    if bounds is not None:
        seconds = (times - first) * tick
        inside = (seconds >= bounds[0]) & (seconds < bounds[1])
        if inside.any():
            order, times = order[inside], times[inside]
        elif bounds[0] < (end - first) * tick:  # between two frames: the one on display
            number = np.searchsorted(seconds, bounds[0], side="right") - 1
            order, times = order[number : number + 1], np.array([first + bounds[0] / tick])
        else:
            detail = f"no frames between {bounds[0]} and {bounds[1]} seconds; mend start and end"
            raise DataError(path, "clip_times", detail)
        end = min(end, first + bounds[1] / tick)
    chosen = choose_frames(times, sampling, end=end, ticks_per_second=1 / tick)
    numbers, repeats = np.unique(chosen, return_inverse=True)
    return _Selection(
        wanted=order[numbers],
        repeats=repeats,
        seconds=((times[chosen] - first) * tick).astype(np.float32),
        duration=float(end - times[0]) * tick,
    )


def _pick(
    frames: Iterator[Any], index: PacketIndex, *, wanted: np.ndarray, to_square: "_Squarer", exact: bool
) -> np.ndarray | None:
    """uint8[n, R, R, 3] of the `wanted` packets (positions, ascending in time), or None if one is lost.

    A lost frame is replaced by the next one and, at the end of the video, by the one before, unless `exact`.
    """
    images = np.empty((len(wanted), to_square.size, to_square.size, 3), np.uint8)
    targets = index.times[wanted].tolist()
    done, last = 0, None
    with contextlib.suppress(SeekError):
        for number, frame in enumerate(frames):
            time = number if index.by_order else frame.pts
            last = frame
            first = done
            while time is not None and done < len(targets) and targets[done] <= time:
                done += 1
            if done > first:
                if exact and (targets[first] != time or frame.is_corrupt):
                    return None
                images[first:done] = to_square(frame)
            if done == len(targets):
                return images
    tail = np.sort(index.times[index.shown])[-_LOST_TAIL - 1 :]
    if exact or last is None or targets[done] < tail[0]:
        return None
    images[done:] = to_square(last)
    return images


class _Squarer:
    """Makes squares uint8[size, size, 3] of video frames; keeps ffmpeg's converter from frame to frame."""

    def __init__(self, size: int, resampling: Resampling, path: PathOrMedia) -> None:
        from av.video.reformatter import VideoReformatter

        self.size = size
        self.path = path
        self._resampling: Resampling = resampling
        self._reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        """The frame turned as its metadata says, and resized."""
        from PIL import Image

        check_pixels(self.path, frame.width, frame.height)
        pixels = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        turns = _quarter_turns(frame)
        if turns:
            pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        return resize(Image.fromarray(pixels), self.size, self._resampling)


def _quarter_turns(frame: Any) -> int:
    """Quarter turns anticlockwise that the metadata ask for."""
    return round(frame.rotation / 90) % 4
