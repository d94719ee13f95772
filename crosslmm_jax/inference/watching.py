"""From media to what the model reads: decoded on the host, and encoded while they are decoded."""

import collections
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, PyTree

from crosslmm_jax.config import ModelConfig, SamplingConfig
from crosslmm_jax.data.media import (
    Clip,
    FrameConsumer,
    Media,
    from_bytes,
    kind_of,
    read_frames,
    stamp_of,
)
from crosslmm_jax.data.text import ClipMeta, time_text
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.compiled import Compiled
from crosslmm_jax.inference.devices import check_memory
from crosslmm_jax.inference.shapes import (
    frames_at_once,
    keeps_pixels,
    padded_frames,
    writes_in_place,
)
from crosslmm_jax.model import Visual
from crosslmm_jax.model_folder import Processor
from crosslmm_jax.parallel import together

# Positions of the decoder that frames must not use: for text about them, a question and its answer.
RESERVED_POSITIONS = 256
MOST_RUNNING = 4  # parts of a video that the encoder has been given and not finished
ANSWER_POSITIONS = 128  # of these, those that the text about frames must not use either


class Medium(NamedTuple):
    """A picture, or a video or folder of frames: all of it, or from `start` to before `end`."""

    source: str | os.PathLike[str] | bytes | Media  # bytes: the content of a file
    start: float | None = None  # seconds
    end: float | None = None  # seconds

    def __str__(self) -> str:
        return "bytes" if isinstance(self.source, bytes) else str(self.source)


AnyMedium: TypeAlias = str | os.PathLike[str] | bytes | Media | Medium
AnyMedia: TypeAlias = AnyMedium | Sequence[AnyMedium]


def media_of(media: AnyMedia) -> tuple[Medium, ...]:
    """One medium or several as a tuple. Raises UserError for none, and for bounds that hold no time."""
    alone = isinstance(media, str | bytes | os.PathLike | Media | Medium)
    several = [media] if alone else list(media)  # type: ignore[arg-type]
    if not several:
        raise UserError("no video or picture is given; give at least one")
    found = tuple(medium if isinstance(medium, Medium) else Medium(medium) for medium in several)
    for medium in found:
        start, end = medium.start or 0.0, np.inf if medium.end is None else medium.end
        if not 0 <= start < end:
            raise UserError(f"{medium}: start {start} and end {end} seconds; 0 <= start < end must hold")
    return found


def check_media(media: AnyMedia) -> None:
    """Raises a UserError for a medium that is not there. Nothing is decoded."""
    for medium in media_of(media):
        if not isinstance(medium.source, bytes):
            kind_of(medium.source)


def sampling_of(processor: Processor, frames: int | None) -> SamplingConfig:
    """How frames are chosen: `frames` spread over the video, or None as in training."""
    if frames is None:
        return processor.sampling
    if frames < 1:
        raise UserError(f"--frames is {frames}; it must be 1 or more")
    return SamplingConfig(policy="uniform", frames=frames)


def most_frames_to_read(media: AnyMedia, processor: Processor, frames: int | None) -> int:
    """The most frames that these media can give together."""
    return len(media_of(media)) * sampling_of(processor, frames).most_frames


def time_texts(clips: Sequence[Clip], processor: Processor) -> list[str | None]:
    """The time instruction of each medium, or None."""
    metas = (ClipMeta(len(clip.times), clip.duration, clip.times.tolist()) for clip in clips)
    return [time_text(meta, processor.time_instruction) for meta in metas]


def most_frames_of(config: ModelConfig) -> int:
    """Frames that the decoder has positions for, beside a question and its answer."""
    return (config.decoder.max_positions - RESERVED_POSITIONS) // config.merge.tokens_per_frame


def check_frames(frames: int, config: ModelConfig, *, given: str = "the media have {} frames") -> None:
    """Raises a UserError if the decoder has too few positions for so many frames."""
    limit = most_frames_of(config)
    if frames > limit:
        raise UserError(
            f"{given.format(frames)}; this model has positions for {limit} at most: read fewer --frames, or"
            " give --yarn, which scales its positions"
        )


def read_everywhere(read: Callable[[], tuple[Clip, ...]]) -> tuple[Clip, ...]:
    """The clips that `read` decodes on every process; raises on all of them what it raises on one.

    All must have the same numbers of frames: the programs that they run together follow from these.
    """
    return together(
        read, same=lambda clips: [len(clip.times) for clip in clips], what="the numbers of frames"
    )


@dataclasses.dataclass(frozen=True)
class UnkeptClip(Clip):
    """A clip without pixels: they were encoded and dropped, and are read again where they are needed.

    Attributes:
        read: reads the file again: (numbers of frames, or None for all; consumer, or None to keep pixels).
        is_same: whether the file is still the one that was watched, as far as can be told without reading it.
    """

    read: Callable[[np.ndarray | None, FrameConsumer | None], Clip] = dataclasses.field(kw_only=True)
    is_same: Callable[[], bool] = dataclasses.field(kw_only=True)

    def again(self, numbers: np.ndarray | None, consumer: FrameConsumer | None = None) -> Clip:
        """These frames, or all, from the file.

        Raises:
            UserError: the file cannot be read any more, or is another one now.
        """
        try:
            clip = self.read(numbers, consumer)
        except IndexError:  # it has fewer frames now
            clip = None
        times = self.times if numbers is None else self.times[numbers]
        if clip is None or not np.array_equal(clip.times, times) or not self.is_same():
            raise UserError("the file of this video has changed since it was watched; watch it again")
        return clip


def pixels_of(clips: Sequence[Clip], numbers: np.ndarray) -> np.ndarray:
    """uint8[n, R, R, 3] of the frames with these numbers, ascending, counted through all clips."""
    found, first = [], 0
    for clip in clips:
        here = numbers[(numbers >= first) & (numbers < first + len(clip.times))] - first
        found.append(clip.again(here).frames if isinstance(clip, UnkeptClip) else clip.frames[here])
        first += len(clip.times)
    return np.concatenate(found)


def read_media(
    media: AnyMedia, frames: int | None, config: ModelConfig, processor: Processor, *,
    consumer: FrameConsumer | None = None, num_threads: int = 0, keyframes: bool = False,
) -> tuple[Clip, ...]:  # fmt: skip
    """Decodes media.

    Args:
        media: a medium or several.
        frames: of each video; None: as in training.
        config: of the model that will see them.
        processor: likewise.
        consumer: is given the frames of the one medium as soon as they are decoded. If there may be more
            than 512 of them (`keeps_pixels`), their pixels are then not kept.
        num_threads: of the decoder; 0: as many as there are cores.
        keyframes: take the keyframes nearest to the times that are wanted, which is faster.

    Raises:
        UserError: a medium is missing or damaged, has no frame within its bounds, or more frames are wanted
            than the decoder has positions for.
    """
    sampling = sampling_of(processor, frames)
    check_frames(sampling.most_frames, config, given="--frames is {}")
    several = media_of(media)
    read = [_reader(medium, sampling, processor, num_threads, keyframes) for medium in several]
    if consumer is None:
        return tuple(read_it(None, None, True) for read_it in read)
    (read_it,) = read
    if keeps_pixels(sampling.most_frames):
        return (read_it(None, consumer, True),)
    source = several[0].source
    stamp = None if isinstance(source, bytes) else stamp_of(source)  # before it is read
    clip = read_it(None, consumer, False)

    def again(numbers: np.ndarray | None, consumer: FrameConsumer | None) -> Clip:
        return read_it(numbers, consumer, consumer is None)

    def is_same() -> bool:
        return isinstance(source, bytes) or stamp_of(source) == stamp

    clip = UnkeptClip(clip.frames, clip.times, clip.duration, clip.damaged, read=again, is_same=is_same)
    return (clip,)


def _reader(
    medium: Medium, sampling: SamplingConfig, processor: Processor, num_threads: int, keyframes: bool
) -> Callable[[np.ndarray | None, FrameConsumer | None, bool], Clip]:
    """Reads a medium: (numbers of frames or None, consumer or None, whether pixels are kept) -> its clip."""
    source = from_bytes(medium.source) if isinstance(medium.source, bytes) else medium.source
    bounds = None
    if medium.start is not None or medium.end is not None:
        bounds = (medium.start or 0.0, np.inf if medium.end is None else medium.end)

    def read(numbers: np.ndarray | None, consumer: FrameConsumer | None, keep: bool) -> Clip:
        return read_frames(
            source, sampling, size=processor.image_size, bounds=bounds, num_threads=num_threads,
            resampling=processor.resampling, deadline_s=None, keyframes=keyframes, only=numbers,
            consumer=consumer, keep=keep,
        )  # fmt: skip

    return read


# Called with the number of frames that have gone to the encoder, and that of all frames.
OnProgress: TypeAlias = Callable[[int, int], None]


class Encoding:
    """The frames of one row of a prompt on their way through the encoder, some at a time."""

    def __init__(self, compiled: Compiled, params: PyTree, on_progress: OnProgress | None = None) -> None:
        """Encodes with these programs and parameters."""
        self._compiled, self._params, self._on_progress = compiled, params, on_progress
        self._total = self._encoded = self._size = 0  # frames: of the row, so far, at a time
        self._image: tuple[int, ...] = ()  # shape of a frame
        self._rest: np.ndarray | None = None  # frames that are too few to be encoded
        self._parts: list[Visual] = []
        self._kept: Visual | None = None  # of a long video, in place of parts
        self._running: collections.deque[Array] = collections.deque()  # what the device has still to do

    def begin(self, count: int, longest: int = 0) -> int:
        """Prepares for a row of `count` frames, in a batch whose longest row has `longest`.

        Returns:
          Frames that are encoded at a time.
        """
        longest = max(count, longest)
        self._total, self._encoded, self._size = count, 0, frames_at_once(longest)
        self._rest, self._parts = None, []
        room = padded_frames(longest)
        if writes_in_place(room):  # before memory is taken
            check_memory(self._compiled.model.config, self._compiled.mesh, longest)
        self._kept = None  # before there is another one
        self._kept = self._compiled.blank_tokens(room) if writes_in_place(room) else None
        return self._size

    def add(self, frames: np.ndarray) -> None:
        """Encodes the next frames, uint8[n, R, R, 3]. Waits only where the device is far behind."""
        if self._rest is not None:
            frames = np.concatenate([self._rest, frames])
        self._image, whole = frames.shape[1:], len(frames) // self._size * self._size
        for begin in range(0, whole, self._size):
            self._encode(frames[None, begin : begin + self._size])
        self._rest = frames[whole:] if whole < len(frames) else None

    def encode(self, clips: Sequence[Clip]) -> tuple[Visual, ...]:
        """The tokens of all clips of the row, of which nothing was added, or all; as `finish`."""
        if not self._total:
            self.begin(sum(len(clip.times) for clip in clips))
            for clip in clips:
                if isinstance(clip, UnkeptClip):
                    clip.again(None, _OneOfSeveral(self))
                else:
                    self.add(clip.frames)
        return self.finish()

    def _encode(self, frames: np.ndarray) -> None:
        new = self._compiled.encode(self._params, frames)
        if self._kept is None:
            self._parts.append(new)
        else:
            self._kept = self._compiled.keep(self._kept, new, self._encoded)
        self._encoded += self._size
        self._running.append(new.compact)
        if len(self._running) > MOST_RUNNING:  # else the device would hold the pixels of all of them
            jax.block_until_ready(self._running.popleft())
        if self._on_progress is not None:
            self._on_progress(min(self._encoded, self._total), self._total)  # without padding

    def finish(self, longest: int = 0) -> tuple[Visual, ...]:
        """The tokens of all frames in parts, padded to a size of `shapes`.

        `longest` as it was given to `begin`.
        """
        shape = (1, self._size, *self._image)
        if self._rest is not None:
            last = np.zeros(shape, np.uint8)
            last[0, : len(self._rest)] = self._rest
            self._rest = None
            self._encode(last)
        assert self._encoded >= self._total
        if self._kept is not None:
            return (self._kept,)
        missing = padded_frames(max(self._total, longest)) // self._size - len(self._parts)
        return (*self._parts, *[self._compiled.blank(self._params, shape)] * missing)

    def drop(self) -> None:
        """Lets go of the tokens, once the prompt has been read."""
        self._parts, self._kept, self._rest, self._total = [], None, None, 0
        self._running.clear()

    def fits(self, longest: int) -> bool:
        """Whether what is encoded serves a batch whose longest row has so many frames."""
        room = padded_frames(longest)
        if self._kept is not None or writes_in_place(room):
            return self._kept is not None and self._kept.originals.shape[1] == room
        return self._size == frames_at_once(longest)

    @property
    def position(self) -> tuple[int, np.ndarray | None]:
        """What was added so far, for `go_back`."""
        return self._encoded, self._rest

    def go_back(self, position: tuple[int, np.ndarray | None]) -> int:
        """Forgets what was added since then. Returns the number of frames that are encoded at a time."""
        self._encoded, self._rest = position
        del self._parts[self._encoded // self._size :]
        return self._size


class _OneOfSeveral:
    """Gives the frames of one of several clips to their encoding."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding, self._position, self.add = encoding, encoding.position, encoding.add

    def begin(self, count: int) -> int:
        """As of `FrameConsumer`."""
        return self._encoding.go_back(self._position)


def stacked(clips: Sequence[Clip]) -> np.ndarray:
    """uint8[F, R, R, 3] of all clips; of one clip its own array."""
    return clips[0].frames if len(clips) == 1 else np.concatenate([clip.frames for clip in clips])
