"""From media to what the model reads: decoded on the host, and encoded while they are decoded."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import PyTree

from crosslmm_jax.config import ModelConfig, SamplingConfig
from crosslmm_jax.data.media import Clip, Media, from_bytes, kind_of, read_frames
from crosslmm_jax.data.text import ClipMeta, time_text
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.compiled import Compiled
from crosslmm_jax.inference.devices import check_memory
from crosslmm_jax.inference.shapes import frames_at_once, padded_frames, writes_in_place
from crosslmm_jax.model import Visual
from crosslmm_jax.model_folder import Processor
from crosslmm_jax.parallel import together

# Positions of the decoder that frames must not use: for text about them, a question and its answer.
RESERVED_POSITIONS = 256
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
    metas = (ClipMeta(len(clip.frames), clip.duration, clip.times.tolist()) for clip in clips)
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
        read, same=lambda clips: [len(clip.frames) for clip in clips], what="the numbers of frames"
    )


def read_media(
    media: AnyMedia, frames: int | None, config: ModelConfig, processor: Processor, *,
    encoding: "Encoding | None" = None, num_threads: int = 0, keyframes: bool = False,
) -> tuple[Clip, ...]:  # fmt: skip
    """Decodes media.

    Args:
        media: a medium or several.
        frames: of each video; None: as in training.
        config: of the model that will see them.
        processor: likewise.
        encoding: is given the frames of the one medium as soon as they are decoded.
        num_threads: of the decoder; 0: as many as there are cores.
        keyframes: take the keyframes nearest to the times that are wanted, which is faster.

    Raises:
        UserError: a medium is missing or damaged, has no frame within its bounds, or more frames are wanted
            than the decoder has positions for.
    """
    sampling = sampling_of(processor, frames)
    check_frames(sampling.most_frames, config, given="--frames is {}")
    return tuple(
        _read_clip(medium, sampling, processor, encoding, num_threads, keyframes)
        for medium in media_of(media)
    )


def _read_clip(
    medium: Medium, sampling: SamplingConfig, processor: Processor, encoding: "Encoding | None",
    num_threads: int, keyframes: bool,
) -> Clip:  # fmt: skip
    source = from_bytes(medium.source) if isinstance(medium.source, bytes) else medium.source
    bounds = None
    if medium.start is not None or medium.end is not None:
        bounds = (medium.start or 0.0, np.inf if medium.end is None else medium.end)
    return read_frames(
        source, sampling, size=processor.image_size, bounds=bounds, num_threads=num_threads,
        resampling=processor.resampling, deadline_s=None, on_frames=encoding and encoding.add,
        keyframes=keyframes,
    )  # fmt: skip


class Encoding:
    """The frames of one row of a prompt on their way through the encoder, some at a time."""

    def __init__(
        self, compiled: Compiled, params: PyTree, on_progress: Callable[[int], None] | None = None
    ) -> None:
        """Encodes with these programs and parameters; `on_progress` is called with the number of frames."""
        self._compiled, self._params, self._on_progress = compiled, params, on_progress
        self._frames: np.ndarray | None = None
        self._size = 0  # frames of a part
        self._parts: list[Visual] = []
        self._kept: Visual | None = None  # of a long video, in place of parts
        self._encoded = 0  # frames

    def add(self, frames: np.ndarray, count: int) -> None:
        """Encodes what it can of uint8[F, R, R, 3], of which the first `count` are there. Does not wait."""
        if frames is not self._frames:
            self._begin(frames, len(frames))
        while self._encoded + self._size <= count:
            self._encode(frames[None, self._encoded : self._encoded + self._size])

    def _begin(self, frames: np.ndarray, longest: int) -> None:
        self._frames, self._size, self._parts, self._encoded = frames, frames_at_once(longest), [], 0
        room = padded_frames(longest)
        if writes_in_place(room):  # before memory is taken
            check_memory(self._compiled.model.config, self._compiled.mesh, longest)
        self._kept = self._compiled.blank_tokens(room) if writes_in_place(room) else None

    def _encode(self, frames: np.ndarray) -> None:
        new = self._compiled.encode(self._params, frames)
        if self._kept is None:
            self._parts.append(new)
        else:
            self._kept = self._compiled.keep(self._kept, new, self._encoded)
        self._encoded += self._size
        if self._on_progress is not None and self._frames is not None:
            self._on_progress(min(self._encoded, len(self._frames)))  # without padding

    def finish(self, frames: np.ndarray, most_frames: int = 0) -> tuple[Visual, ...]:
        """The tokens of all frames uint8[F, R, R, 3] in parts, padded to a size of `shapes`.

        `most_frames` are those of the longest row of a batch, whose size this row then has too.
        """
        longest = max(len(frames), most_frames)
        if frames is not self._frames or not self._fits(longest):
            self._begin(frames, longest)
        self.add(frames, len(frames))
        shape = (1, self._size, *frames.shape[1:])
        if self._encoded < len(frames):
            last = np.zeros(shape, np.uint8)
            last[0, : len(frames) - self._encoded] = frames[self._encoded :]
            self._encode(last)
        if self._kept is not None:
            return (self._kept,)
        missing = padded_frames(longest) // self._size - len(self._parts)
        return (*self._parts, *[self._compiled.blank(self._params, shape)] * missing)

    def _fits(self, longest: int) -> bool:
        """Whether what is encoded so far serves a batch whose longest row has so many frames."""
        room = padded_frames(longest)
        if self._kept is not None or writes_in_place(room):
            return self._kept is not None and self._kept.originals.shape[1] == room
        return self._size == frames_at_once(longest)


def stacked(clips: Sequence[Clip]) -> np.ndarray:
    """uint8[F, R, R, 3] of all clips; of one clip its own array."""
    return clips[0].frames if len(clips) == 1 else np.concatenate([clip.frames for clip in clips])
