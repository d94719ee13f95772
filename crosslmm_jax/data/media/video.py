"""Reads the sampled frames of a video as square uint8 pixels with their times, and probes videos.

1. All frame times are listed without decoding: from the tables of an mp4, or from all packets (packet_index).
2. The sampling rule chooses frames by these times (frame_sampling, decoding.chosen_frames).
3. Only the GOPs that hold chosen frames are read, each up to its last chosen frame (decode, wanted_frames). A
   file that turns out to be damaged is refused if too much of it is (damage). Unless it is very long, it is
   decoded whole.
4. Only the chosen frames are converted to RGB and resized.

Folders of pictures and still images are read by the same functions.
"""

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.animation import TICK, frame_times, is_animated, read_animation
from crosslmm_jax.data.media.decoding import (
    MAX_DAMAGED,
    DamagedFrameError,
    FrameConsumer,
    FrameStore,
    GopDecoder,
    LateFrameError,
    LostFrameError,
    Part,
    PlainDecode,
    Put,
    SeekError,
    check_share,
    count_damaged,
    estimate_damaged,
    is_above,
    is_worth_threads,
    known_damage,
    take_around,
    take_exactly,
    take_from_whole_gops,
    take_in_threads,
    take_shown,
)
from crosslmm_jax.data.media.decoding.chosen_frames import ChosenFrames, choose_within, nearest_keyframes
from crosslmm_jax.data.media.demux import DAMAGED, SEEKABLE, format_of, open_video
from crosslmm_jax.data.media.frames_folder import list_pictures, read_pictures
from crosslmm_jax.data.media.image import Clip, Resampling, holds_image, open_image, still_clip
from crosslmm_jax.data.media.locate import (
    DEADLINE_S,
    Deadline,
    Media,
    PathOrMedia,
    folder_rate,
    kind_of,
    options_of,
    size_of,
)
from crosslmm_jax.data.media.orientation import EXIF_FIELD, Orientation, of_exif
from crosslmm_jax.data.media.packet_index import PacketIndex, at_beginning, open_indexed
from crosslmm_jax.data.media.to_square import ToSquare, orientation_of
from crosslmm_jax.errors import DataError

if TYPE_CHECKING:
    from av.video.stream import VideoStream

_Choose = Callable[..., ChosenFrames]  # (times; end, tick), as of `choose_within`
_Into = Callable[..., FrameStore]  # (repeats; may_replace)
Effort = Literal["exactly", "around", "from_whole_gops", "plainly"]
DECODE_UP_TO = 1000  # frames of a video that a probe decodes whole, by default: a second of work at most
WHOLE_UP_TO = 10_000  # frames of a damaged video that is decoded whole: some seconds of work


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds. Duration, fps and keyframe spacing of a still image are 0.

    Attributes:
        duration: seconds.
        fps: mean frames per second.
        num_frames: 1 for a still image.
        width: pixels as stored, before rotation.
        height: likewise.
        size_bytes: size of the file, or of all pictures of a folder.
        codec: ffmpeg's name of the codec, or PIL's name of the image format in lower case.
        keyframe_spacing: mean seconds from one keyframe to the next.
        rotation: degrees anticlockwise by which the stored picture is to be rotated: 0, 90, 180 or 270.
        mirrored: the picture is to be mirrored left to right after that.
        damaged: number of damaged frames; None if they were not counted.
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
    mirrored: bool = False
    damaged: int | None = 0


def probe(
    path: PathOrMedia, *, deadline_s: float | None = DEADLINE_S, decode_up_to: int | None = DECODE_UP_TO,
    max_damaged: float = MAX_DAMAGED,
) -> VideoInfo:  # fmt: skip
    """Length, frame rate and size of a video, from its tables or packets.

    Short videos are decoded to count damaged frames. Of long ones a few hundred frames are decoded, all over
    the file. The others follow if one of these is damaged, or in a video of more than WHOLE_UP_TO frames, if
    too many are. Of still pictures only the headers are read, also in a folder.

    Args:
        path: a video, a folder of its frames, or a still image: a path, or a result of `open_media`.
        deadline_s: fail after this many seconds without a packet or picture; None for no limit.
        decode_up_to: most frames of a video that is decoded whole; None: all videos are; 0: none, not
            even in parts.
        max_damaged: as of `read_frames`.

    Raises:
        DataError: the file is missing or damaged, or holds no video.
    """
    deadline = Deadline(path, deadline_s)
    if kind_of(path) == "folder":
        _check_no_stream(path)
        infos, rate = [], folder_rate(path)
        for picture in list_pictures(path):
            deadline.check()
            infos.append(_probe_image(picture, deadline))
        return dataclasses.replace(
            infos[0],
            duration=len(infos) / rate,
            fps=rate,
            num_frames=len(infos),
            size_bytes=sum(info.size_bytes for info in infos),
            keyframe_spacing=1 / rate,
        )
    if holds_image(path):
        _check_no_stream(path)
        return _probe_image(path, deadline)
    with open_indexed(path, deadline) as (stream, index):
        duration = (index.end - int(index.times[index.shown].min())) * index.tick
        frames = int(index.shown.sum())
        context = stream.codec_context
        orientation = _first_orientation(stream, index, deadline)
        return VideoInfo(
            duration=duration,
            fps=frames / duration,
            num_frames=frames,
            width=context.width,
            height=context.height,
            size_bytes=size_of(path),
            codec=context.codec.canonical_name,
            keyframe_spacing=duration / (int(index.gops.max()) + 1),
            rotation=orientation.rotation,
            mirrored=orientation.is_mirror_image,
            damaged=_count(_Indexed(stream, index, path, deadline), decode_up_to, max_damaged),
        )


def _count(video: "_Indexed", decode_up_to: int | None, max_damaged: float) -> int | None:
    """Number of damaged frames, or None where not all are counted. Raises DataError if there are too many."""
    index = video.index
    if decode_up_to is not None and len(index.times) > decode_up_to:
        check_share(known_damage(index), index, video.path, most=max_damaged)
        if not decode_up_to or not _is_worth_counting(video, max_damaged):
            return None
    with video.plain_decode() as decode:
        for _ in decode.frames():
            pass
        return count_damaged(decode, index, video.path, most=max_damaged)


def _is_worth_counting(video: "_Indexed", max_damaged: float) -> bool:
    """Whether all of a long video is to be decoded, by what is found at places all over it."""
    estimate = known_damage(video.index)
    with contextlib.suppress(LostFrameError, SeekError):
        estimate = _estimate(video)
    return is_above(estimate, video.index, most=max_damaged if _is_long(video.index) else 0)


def _check_no_stream(path: PathOrMedia) -> None:
    """Raises DataError when an annotation chooses a stream of something that has none."""
    if options_of(path).stream is not None:
        raise DataError(path, "no_video", "is no file with streams; leave stream out of its row")


def _probe_image(path: PathOrMedia, deadline: Deadline) -> VideoInfo:
    """Size and format of a still image from its header; of an animated one all frames are decoded."""
    with open_image(path) as image:
        orientation = of_exif(image.getexif().get(EXIF_FIELD))
        info = VideoInfo(
            duration=0.0, fps=0.0, num_frames=1, width=image.width, height=image.height,
            size_bytes=size_of(path), codec=(image.format or "").lower(), keyframe_spacing=0.0,
            rotation=orientation.rotation, mirrored=orientation.is_mirror_image,
        )  # fmt: skip
        if not is_animated(image):
            return info
        times, end = frame_times(image, deadline)
        duration = end * TICK
        # Frames build on the ones before, so that the first one alone is a keyframe.
        return dataclasses.replace(
            info,
            duration=duration,
            fps=len(times) / duration,
            num_frames=len(times),
            keyframe_spacing=duration,
        )


def _first_orientation(stream: "VideoStream", index: PacketIndex, deadline: Deadline) -> Orientation:
    """Orientation of the first frame. PyAV knows it of decoded frames only; none if that one is damaged."""
    import av.error

    if format_of(stream) not in SEEKABLE:
        return Orientation()  # other formats store none
    first = int(np.flatnonzero(index.shown)[0])
    with contextlib.suppress(av.error.FFmpegError, SeekError, DamagedFrameError, LostFrameError):
        decoder = GopDecoder(stream, index, shortcuts=True, wanted={first}, deadline=deadline)
        for _, frame in decoder.frames(0, first + 1):
            return orientation_of(frame)
    return Orientation()


def import_readers() -> None:
    """Imports PyAV and Pillow in the calling thread: call it before threads read media.

    While TensorFlow Datasets is imported, it replaces `__import__` for all threads. A thread that first
    imports PyAV at that moment gets modules that do not work, and a good file would count as corrupt.
    """
    from PIL import Image

    for name in ("av", "av.error", "av.stream", "av.video.reformatter", "PIL.ImageOps"):
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif")  # a plugin that users may install
    Image.init()  # the plugins of all image formats


def read_frames(
    path: PathOrMedia,
    sampling: SamplingConfig,
    *,
    size: int,
    bounds: tuple[float, float] | None = None,
    num_threads: int = 1,
    resampling: Resampling = "bicubic",
    deadline_s: float | None = DEADLINE_S,
    max_damaged: float = MAX_DAMAGED,
    keyframes: bool = False,
    only: np.ndarray | None = None,
    consumer: FrameConsumer | None = None,
    keep: bool = True,
) -> Clip:
    """Reads the frames that `sampling` chooses, each resized to `size` x `size` by PIL.

    Args:
        path: a video, a folder of its frames, or a still image (one frame at time 0): a path, or a result
            of `open_media`, whose options say which stream of a file is read and the rate of a folder.
        sampling: the rule that chooses frames.
        size: R, pixels of each side. The aspect ratio is not kept, as in SigLIP.
        bounds: (start, end) in seconds of the part to read; None for the whole video.
        num_threads: threads of the decoder, and at most as many that resize; 0: as many as there are cores.
        resampling: filter of the resizing.
        deadline_s: fail after this many seconds without a packet or picture; None for no limit.
        max_damaged: a video is refused if a larger share of its frames is damaged.
        keyframes: of a video file, take the keyframe nearest to each time that `sampling` chooses; the clip
            has their times, and each of them once.
        only: int64[n], numbers of frames of the clip, ascending: the clip has these alone. None: all.
        consumer: is given the frames while later ones are decoded, in a thread of its own. Those of a
            damaged file come when all are there, or when they have to make room.
        keep: keep the pixels. If not, only `MOST_WAITING` frames exist at a time, and the clip has only
            times; this needs a `consumer`.

    Raises:
        DataError: the file is missing, damaged or stalls, or it holds no video or no frame within the bounds.
    """
    deadline = Deadline(path, deadline_s)
    into = functools.partial(FrameStore, size=size, consumer=consumer, keep=keep)
    choose = functools.partial(choose_within, sampling=sampling, bounds=bounds, path=path)
    if kind_of(path) == "folder":
        return _read_folder(path, choose, only, into, resampling=resampling, deadline=deadline)
    if holds_image(path):
        return _read_picture(path, choose, only, into, resampling=resampling, deadline=deadline)
    at_most = num_threads or os.cpu_count() or 1  # threads
    damaged, use_tables = False, True
    for effort in ("exactly", "around", "from_whole_gops", "plainly"):
        if damaged and effort == "around":
            continue
        # Several would report damage late.
        threads = 1 if effort in ("from_whole_gops", "plainly") else num_threads
        with open_indexed(path, deadline, threads, use_tables=use_tables) as (stream, index):
            _check_known(index, path, max_damaged=max_damaged)
            # A few damaged packets of a long video, as broadcasts often have, matter where they are met.
            damaged |= not _is_long(index) and (known_damage(index) or _counted(path) or 0) > 0
            if effort == "from_whole_gops" and not _is_long(index):
                continue
            if damaged and effort in ("exactly", "around"):
                continue
            shown = np.flatnonzero(index.shown)
            chosen = choose(index.times[shown], end=index.end, tick=index.tick)
            if keyframes:
                chosen = nearest_keyframes(chosen, index, shown, bounds)
            chosen = chosen.only(only)
            # The other efforts may replace an image, so one thread makes them.
            in_order, wanted, count = effort == "exactly", shown[chosen.frames], 0
            to_square = ToSquare(size, resampling, path, num_threads if in_order else 1)
            try:
                with into(chosen.repeats, may_replace=not in_order) as store:
                    if in_order and is_worth_threads(index, wanted, threads=at_most):
                        take_in_threads(
                            functools.partial(_open_decoder, path, index, wanted, deadline_s), index, wanted,
                            to_square.here(store), threads=at_most, stop=store.stop,
                        )  # fmt: skip
                    else:
                        with to_square.into(store) as put:
                            video = _Indexed(stream, index, path, deadline)
                            count = _take(video, wanted, put, effort=effort, max_damaged=max_damaged)
            except DamagedFrameError:
                damaged, use_tables = True, _is_long(index)
            except (LostFrameError, SeekError, LateFrameError):
                use_tables = False
            else:
                return chosen.clip(store.images, damaged=count)
    raise DataError(path, "truncated", DAMAGED)


def _read_folder(
    path: PathOrMedia, choose: _Choose, only: np.ndarray | None, into: _Into, *, resampling: Resampling,
    deadline: Deadline,
) -> Clip:  # fmt: skip
    _check_no_stream(path)
    pictures = list_pictures(path)
    chosen = choose(np.arange(len(pictures)), end=len(pictures), tick=1 / folder_rate(path)).only(only)
    with into(chosen.repeats) as store:
        wanted = [pictures[number] for number in chosen.frames]
        read_pictures(wanted, store, resampling=resampling, deadline=deadline)
    return chosen.clip(store.images)


def _read_picture(
    path: PathOrMedia, choose: _Choose, only: np.ndarray | None, into: _Into, *, resampling: Resampling,
    deadline: Deadline,
) -> Clip:  # fmt: skip
    """A still picture, or an animated one."""
    _check_no_stream(path)
    with open_image(path) as image:
        if not is_animated(image):
            with into(np.zeros(1, np.int64)) as store:
                still = still_clip(image, store.size, resampling)
                store.put(0, 1, still.frames[0])
            return dataclasses.replace(still, frames=store.images)
        times, end = frame_times(image, deadline)
        chosen = choose(times, end=end, tick=TICK).only(only)
        with into(chosen.repeats) as store:
            read_animation(image, chosen.frames, store, resampling=resampling, deadline=deadline)
        return chosen.clip(store.images)


@contextlib.contextmanager
def _open_decoder(
    path: PathOrMedia, index: PacketIndex, wanted: np.ndarray, deadline_s: float | None
) -> Iterator[GopDecoder]:
    deadline = Deadline(path, deadline_s)
    with open_video(path, deadline) as stream:
        yield GopDecoder(stream, index, shortcuts=True, wanted=set(wanted.tolist()), deadline=deadline)


class _Indexed(NamedTuple):
    """An open video file."""

    stream: "VideoStream"
    index: PacketIndex
    path: PathOrMedia
    deadline: Deadline

    @contextlib.contextmanager
    def decoder(self, wanted: Container[int] | None, *, shortcuts: bool) -> Iterator[GopDecoder]:
        """A decoder of the packets; `wanted` and `shortcuts` are as of `GopDecoder`."""
        index, deadline = self.index, self.deadline
        with at_beginning(self.stream, index, self.path, deadline, unless_sought=shortcuts) as stream:
            yield GopDecoder(stream, index, shortcuts=shortcuts, wanted=wanted, deadline=deadline)

    @contextlib.contextmanager
    def plain_decode(self) -> Iterator[PlainDecode]:
        """A decode of all packets."""
        index, deadline = self.index, self.deadline
        with at_beginning(self.stream, index, self.path, deadline, unless_sought=False) as stream:
            yield PlainDecode(stream, index, deadline)


def _take(video: _Indexed, wanted: np.ndarray, put: Put, *, effort: Effort, max_damaged: float) -> int:
    """Puts the frames at the times of the `wanted` packets. Returns the number of damaged frames."""
    index, exactly = video.index, effort == "exactly"
    if effort in ("exactly", "around"):
        with video.decoder(set(wanted.tolist()), shortcuts=exactly) as decoder:
            (take_exactly if exactly else take_around)(decoder, index, wanted, put)
        return 0
    if effort == "from_whole_gops":
        counted = _counted(video.path)
        damaged = _estimate(video) if counted is None else counted
        if is_above(damaged, index, most=max_damaged):
            raise LostFrameError  # all of the file tells how many they are
        with video.decoder(None, shortcuts=True) as decoder:
            take_from_whole_gops(decoder, index, wanted, put)
        return max(damaged, len(decoder.damage_met))
    with video.plain_decode() as decode:
        everything = Part(0, len(index.times), wanted, 0)
        take_shown(decode.frames(), index, everything, put, from_beginning=True)
        return count_damaged(decode, index, video.path, most=max_damaged)


def _estimate(video: _Indexed) -> int:
    """Estimates the number of damaged frames. Raises as `estimate_damaged`."""
    with video.decoder(None, shortcuts=True) as decoder:
        return estimate_damaged(decoder, video.index)


def _is_long(index: PacketIndex) -> bool:
    """Whether a video is too long to be decoded whole for every read where it is damaged."""
    return len(index.times) > WHOLE_UP_TO


def _counted(path: PathOrMedia) -> int | None:
    """Damaged frames as counted earlier; None if they were not."""
    return path.damaged if isinstance(path, Media) else None


def _check_known(index: PacketIndex, path: PathOrMedia, *, max_damaged: float) -> None:
    """Raises DataError when too much is known to be damaged before anything is decoded."""
    known = known_damage(index) if _is_long(index) else 0  # a short one is counted
    check_share(max(known, _counted(path) or 0), index, path, most=max_damaged)
