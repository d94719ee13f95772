"""Many questions about many videos: each video decoded and encoded once, questions answered together."""

import collections
import contextlib
import itertools
import os
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from crosslmm_jax.data.media import Clip
from crosslmm_jax.data.text import TokenSequence, question_suffix
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.assistant import Answer, Prefix, VideoModel
from crosslmm_jax.inference.devices import BatchMemory, check_memory
from crosslmm_jax.inference.replies import AnswerOptions
from crosslmm_jax.inference.shapes import keeps_pixels
from crosslmm_jax.inference.watching import (
    AnyMedia,
    Encoding,
    check_frames,
    media_of,
    read_everywhere,
    sampling_of,
    stacked,
)
from crosslmm_jax.model import Visual

MOST_ROWS = 32  # questions that are answered together
MOST_AHEAD = 16  # videos that are decoded ahead of the one that is encoded
FRAMES_AHEAD = 8192  # their frames, whose pixels the host holds; of longer videos fewer are ahead
DECODERS = 4  # videos that are decoded at a time, each with its share of the cores: the first is soon there


class Item(NamedTuple):
    """A question about media, with options of its own."""

    media: AnyMedia
    question: str
    options: AnswerOptions = AnswerOptions()


class _Watched(NamedTuple):
    """A decoded video with its questions."""

    clips: tuple[Clip, ...]
    frames: np.ndarray  # uint8[F, R, R, 3], of all clips
    encoding: Encoding
    items: list[tuple[int, Item]]  # (number of the item, item)

    @classmethod
    def of(cls, model: VideoModel, clips: tuple[Clip, ...], items: list[tuple[int, Item]]) -> "_Watched":
        """Sends the frames to the encoder, without waiting for it."""
        watched = cls(clips, stacked(clips), Encoding(model.compiled, model.params), items)
        with contextlib.suppress(UserError):  # more than the device holds: told when it is answered
            watched.encode()
        return watched

    def encode(self, longest: int = 0) -> None:
        """Gives the encoder all frames, for a batch whose longest row has `longest`."""
        self.encoding.begin(len(self.frames), longest)
        self.encoding.add(self.frames)

    def tokens(self, longest: int) -> tuple[Visual, ...]:
        """The encoded frames, for a batch whose longest row has `longest`."""
        if not self.encoding.fits(longest):
            self.encode(longest)
        return self.encoding.finish(longest)


def answer_many(
    model: VideoModel, items: Sequence[Item | tuple], *, frames: int | None = None,
    keyframes: bool = False, videos_at_once: int | None = None,
) -> list[Answer | UserError]:  # fmt: skip
    """Answers questions about many videos; see `answers_as_ready`.

    Args:
        model: the model.
        items: (media, question) or (media, question, `AnswerOptions`) each.
        frames: of each video; None: as in training.
        keyframes: as for `VideoModel.watch`.
        videos_at_once: as for `answers_as_ready`.

    Returns:
        For each item its answer, or why its media or its question cannot be used.
    """
    each = [Item(*item) for item in items]  # type: ignore[arg-type]  # two or three of its fields
    ready = answers_as_ready(model, each, frames=frames, keyframes=keyframes, videos_at_once=videos_at_once)
    answers = dict(ready)
    return [answers[number] for number in range(len(items))]


def answers_as_ready(
    model: VideoModel,
    items: Iterable[Item],
    *,
    frames: int | None = None,
    keyframes: bool = False,
    videos_at_once: int | None = None,
) -> Iterator[tuple[int, Answer | UserError]]:
    """Answers questions, each as soon as it is there.

    Neighbouring questions about the same media (equal paths and bounds) share one decoding, one encoding and
    one video KV cache. Videos of a batch are divided among the devices. An answer does not depend on the
    other questions.

    Args:
        model: the model.
        items: read as needed, some videos ahead.
        frames: of each video; None: as in training.
        keyframes: as for `VideoModel.watch`.
        videos_at_once: most videos of a batch; None: `BatchMemory.most_videos`. A batch that does not fit the
            devices is made smaller.

    Yields:
        The number of an item; and its answer, or why its media or its question cannot be used.
    """
    memory = BatchMemory(model.config, model.compiled.mesh)
    count = memory.most_videos if videos_at_once is None else videos_at_once
    if count < 1:
        raise UserError(f"videos_at_once is {count}; it must be 1 or more")
    most = sampling_of(model.processor, frames).most_frames
    if not keeps_pixels(most) and model.compiled.mesh.size == model.compiled.mesh.shape["tensor"]:
        yield from _one_by_one(model, items, memory, frames, keyframes)
        return
    pool = ThreadPoolExecutor(DECODERS)
    try:
        batch: list[_Watched] = []
        for group, clips in _decoded(model, items, pool, frames, keyframes):
            if isinstance(clips, UserError):
                yield from ((number, clips) for number, _ in group)
                continue
            longest = max([sum(len(clip.times) for clip in clips), *(len(w.frames) for w in batch)])
            if batch and not memory.fits(longest, len(batch) + 1):  # before more is encoded
                yield from _answer_batch(model, batch, memory)
                batch = []
            batch.append(_Watched.of(model, clips, group))
            if len(batch) == count:
                yield from _answer_batch(model, batch, memory)
                batch = []
        if batch:
            yield from _answer_batch(model, batch, memory)
    finally:
        pool.shutdown(cancel_futures=True)  # a caller that stops early waits only for videos already begun


def _one_by_one(
    model: VideoModel, items: Iterable[Item], memory: BatchMemory, frames: int | None, keyframes: bool
) -> Iterator[tuple[int, Answer | UserError]]:
    """Answers questions about long videos, each encoded while it is decoded, so that no pixels are kept."""
    for group in _grouped(items):
        try:
            video = model.watch(group[0][1].media, frames, keyframes=keyframes)
        except UserError as error:
            yield from ((number, error) for number, _ in group)
            continue
        yield from _answer_all(model, video.prefix, [group], memory, len(video.frame_times))
        del video  # its caches, before those of the next one are made


def _grouped(items: Iterable[Item]) -> Iterator[list[tuple[int, Item]]]:
    """Neighbouring questions about the same media, with their numbers."""
    for _, grouped in itertools.groupby(enumerate(items), key=lambda numbered: _key(numbered[1].media)):
        yield list(grouped)


def _decoded(
    model: VideoModel, items: Iterable[Item], pool: ThreadPoolExecutor, frames: int | None, keyframes: bool
) -> Iterator[tuple[list[tuple[int, Item]], tuple[Clip, ...] | UserError]]:
    """Groups of questions about the same media with their clips, decoded ahead in threads."""
    threads = max(1, (os.cpu_count() or 1) // DECODERS)
    waiting: collections.deque[tuple[list[tuple[int, Item]], Future[tuple[Clip, ...]]]] = collections.deque()

    def collect() -> tuple[list[tuple[int, Item]], tuple[Clip, ...] | UserError]:
        group, future = waiting.popleft()
        try:
            return group, read_everywhere(future.result)
        except UserError as error:
            return group, error

    most = sampling_of(model.processor, frames).most_frames
    ahead = max(1, min(MOST_AHEAD, FRAMES_AHEAD // most))
    for group in _grouped(items):
        media = group[0][1].media
        clips = pool.submit(model.read, media, frames, num_threads=threads, keyframes=keyframes)
        waiting.append((group, clips))
        if len(waiting) > ahead:
            yield collect()
    while waiting:
        yield collect()


def _key(media: AnyMedia) -> Hashable:
    """Equal for media that are the same files, or the same objects."""
    try:
        several = media_of(media)
    except UserError:  # told when they are read
        return id(media)
    return tuple(
        (
            str(medium.source) if isinstance(medium.source, str | os.PathLike) else id(medium.source),
            medium[1:],
        )
        for medium in several
    )


def _answer_batch(
    model: VideoModel, batch: Sequence[_Watched], memory: BatchMemory
) -> Iterator[tuple[int, Answer | UserError]]:
    """Prefills some videos together and answers their questions."""
    try:
        prefix = _prefix(model, batch)
    except UserError as error:
        if len(batch) > 1:  # one of them has too many frames: each for itself
            for watched in batch:
                yield from _answer_batch(model, [watched], memory)
            return
        yield from ((number, error) for number, _ in batch[0].items)
        return
    for watched in batch:
        watched.encoding.drop()
    longest = max(len(watched.frames) for watched in batch)
    yield from _answer_all(model, prefix, [watched.items for watched in batch], memory, longest)


def _answer_all(
    model: VideoModel, prefix: Prefix, items: Sequence[Sequence[tuple[int, Item]]], memory: BatchMemory,
    longest: int,
) -> Iterator[tuple[int, Answer | UserError]]:  # fmt: skip
    """Answers the questions about the videos of a prefix, equally many of each in every round."""
    questions = []
    for row, of_video in enumerate(items):
        asked, refused = _checked(model, of_video, prefix.lengths[row])
        yield from refused
        questions.append(asked)
    most = max(len(asked) for asked in questions)
    if not most:
        return
    each = min(1 << (most - 1).bit_length(), max(1, MOST_ROWS // len(items)))
    each = memory.questions_at_once(longest, len(items), each)
    for begin in range(0, most, each):
        yield from _answer_round(model, prefix, [asked[begin : begin + each] for asked in questions], each)


def _prefix(model: VideoModel, batch: Sequence[_Watched]) -> Prefix:
    """The prompts of some videos up to their questions."""
    most = max(len(watched.frames) for watched in batch)
    check_frames(most, model.config)
    check_memory(model.config, model.compiled.mesh, most)
    parts = [watched.tokens(most) for watched in batch]
    clips = [watched.clips for watched in batch]
    return model.prefill([model.prompt_of(of_video) for of_video in clips], clips, parts)


class _Asked(NamedTuple):
    """A question as tokens."""

    number: int  # of the item
    suffix: TokenSequence
    options: AnswerOptions


def _checked(
    model: VideoModel, items: Sequence[tuple[int, Item]], cached: int
) -> tuple[list[_Asked], list[tuple[int, UserError]]]:
    """Questions that can be answered after `cached` tokens, and errors of the others."""
    good, refused = [], []
    for number, item in items:
        try:
            prefix = item.options.answer_prefix
            suffix = question_suffix(item.question, model.tokenizer, answer_prefix=prefix)
            model.check_positions(cached, len(suffix.ids), item.options.max_new_tokens)
            good.append(_Asked(number, suffix, item.options))
        except UserError as error:
            refused.append((number, error))
    return good, refused


def _answer_round(
    model: VideoModel, prefix: Prefix, questions: Sequence[Sequence[_Asked]], each: int
) -> Iterator[tuple[int, Answer]]:
    """Answers up to `each` questions of every video together. Rows without a question read one token."""
    begun, pad = time.perf_counter(), model.tokenizer.pad
    rows = [asked[i] if i < len(asked) else None for asked in questions for i in range(each)]
    nothing = _Asked(-1, TokenSequence.of_text([pad]), AnswerOptions(max_new_tokens=1))
    filled = [row or nothing for row in rows]
    steps = model.replies_to(prefix, [row.suffix for row in filled], [row.options for row in filled])
    *_, grown = steps
    yield from ((row.number, Answer.of(reply, begun)) for row, reply in zip(rows, grown, strict=True) if row)
