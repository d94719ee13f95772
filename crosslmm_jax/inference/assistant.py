"""Ask about videos: decode and encode them once, then answer any number of questions.

model = load("runs/demo")
video = model.watch("clip.mp4", frames=64)
print(video.ask("What is the man doing?"))
"""

import dataclasses
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Literal, NamedTuple, Unpack

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from crosslmm_jax.batch import Batch, RowOrNone
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.data.media import Clip, FrameConsumer
from crosslmm_jax.data.text import (
    ClipMeta,
    Tokenizer,
    TokenSequence,
    further_media,
    lay_out,
    media_prefix,
    next_question,
    pad_rows,
    question_suffix,
    time_text,
)
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.compiled import Compiled
from crosslmm_jax.inference.devices import check_memory
from crosslmm_jax.inference.replies import AnswerOptions, Options, Reply, replies
from crosslmm_jax.inference.shapes import (
    FRAME_SIZES,
    QUESTION_TOKENS,
    frame_sizes,
    grown,
    padded_frames,
    prompt_shape,
    round_up,
)
from crosslmm_jax.inference.watching import (
    ANSWER_POSITIONS,
    AnyMedia,
    Encoding,
    OnProgress,
    UnkeptClip,
    check_frames,
    media_of,
    most_frames_of,
    pixels_of,
    read_everywhere,
    read_media,
    stacked,
    time_texts,
)
from crosslmm_jax.model import KVCache, Visual
from crosslmm_jax.model_folder import Processor

_TEXT_STEP = 32  # tokens; room for the text of a prompt is a multiple
_USUAL_DURATION = 999.0  # seconds; the time instruction of a longer video may compile anew


def usual_text(frames: int, tokenizer: Tokenizer, processor: Processor) -> int:
    """Room for the text of a prompt about one video of so many frames, in tokens."""
    size = padded_frames(frames)
    meta = ClipMeta(size, _USUAL_DURATION, [_USUAL_DURATION] * size)
    times = [time_text(meta, processor.time_instruction)]
    prompt = media_prefix(tokenizer, times, system_prompt=processor.system_prompt)
    return round_up(prompt.num_text_tokens, _TEXT_STEP)


class Prefix(NamedTuple):
    """What comes before a question: a row per prompt."""

    cache: KVCache
    lengths: tuple[int, ...]  # tokens of each row


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer with its length, end and time."""

    text: str
    num_tokens: int  # generated, without the end token
    seconds: float  # from the question to the last token, of all questions that were answered together
    finish_reason: Literal["stop", "length"] = "stop"  # "length": `max_new_tokens` came before an end
    first_token_s: float = 0.0  # seconds from the question to the first token

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over `seconds`."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0

    @classmethod
    def of(cls, reply: Reply, begun: float) -> "Answer":
        """The answer of a finished reply to a question that was asked at `begun`."""
        assert reply.finish_reason is not None
        seconds, first = time.perf_counter() - begun, reply.first_at - begun
        return cls(reply.text, len(reply.ids), seconds, reply.finish_reason, first)


class VideoModel:
    """A model that can watch videos. Made by `load`."""

    def __init__(
        self,
        config: ModelConfig,
        params: PyTree[Array],
        tokenizer: Tokenizer,
        processor: Processor,
        mesh: Mesh,
        seconds: dict[str, float] | None = None,
    ) -> None:
        """Takes parameters as `prepare_params` makes them, on the devices of `mesh`."""
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.processor = processor
        self.compiled = Compiled(config, mesh)
        self.ends = tokenizer.ids_of(processor.end_tokens)
        self.seconds = seconds or {}  # of `load`, by part

    def watch(
        self, media: AnyMedia, frames: int | None = None, *, keyframes: bool = False, timed: bool = False,
        on_progress: OnProgress | None = None,
    ) -> "Video":  # fmt: skip
        """Decodes and encodes a video, a picture, or several. Each question then costs only its own tokens.

        Args:
          media: a path, the bytes of a file, a folder of frames, or a `Medium` with start and end; or a list
            of these, which the model sees in this order.
          frames: number of frames to read of each video; None: as in training.
          keyframes: read the keyframes nearest to the wanted times, which takes a fraction of the time for a
            long video. `Video.frame_times` has the real times; wanted times that share a keyframe give one.
          timed: wait for each phase, so that `Video.seconds` has its time.
          on_progress: called with the number of frames that have gone to the encoder, and of all frames.

        Raises:
          UserError: a medium is missing or damaged, or the decoder has too few positions for the frames, or
            the devices too little memory.
        """
        begun = time.perf_counter()
        # Frames of one video go to the encoder while later ones are decoded. Not with several processes: they
        # must run the same programs, and one of them may fail to decode the rest.
        at_once = len(media_of(media)) == 1 and jax.process_count() == 1
        encoding = Encoding(self.compiled, self.params, on_progress) if at_once else None
        try:
            clips = read_everywhere(lambda: self.read(media, frames, consumer=encoding, keyframes=keyframes))
            seconds = {"decode": time.perf_counter() - begun} if timed else None
            return self.watch_clips(clips, encoding=encoding, seconds=seconds)
        except BaseException:
            if encoding is not None:
                encoding.drop()  # whoever keeps the error would keep what was encoded
            raise

    def warm_up(self, most_frames: int = FRAME_SIZES[-1]) -> None:
        """Compiles, or reads from disk, all programs for videos of up to `most_frames` frames.

        Further videos then compile nothing, if they are asked one question at a time. Sizes that the decoder
        has no positions for, text included, are left out.
        """
        pixels = (self.processor.image_size,) * 2 + (3,)
        positions = self.config.decoder.max_positions - ANSWER_POSITIONS
        most = min(most_frames, most_frames_of(self.config))
        for count in (min(size, most) for size in frame_sizes(most)):
            text = usual_text(count, self.tokenizer, self.processor)
            if count * self.processor.tokens_per_frame + text > positions:
                continue
            frames = np.zeros((count, *pixels), np.uint8)
            self.watch_frames(frames, np.zeros(count, np.float32), 0.0).ask("?", max_new_tokens=1)

    def read(
        self, media: AnyMedia, frames: int | None = None, *, consumer: FrameConsumer | None = None,
        num_threads: int = 0, keyframes: bool = False,
    ) -> tuple[Clip, ...]:  # fmt: skip
        """Decodes media, as `watch` does.

        Args:
          media: as for `watch`.
          frames: likewise.
          consumer: is given the frames of the one medium as soon as they are decoded; see `read_media`.
          num_threads: of the decoder; 0: as many as there are cores.
          keyframes: as for `watch`.

        Raises:
          UserError: as `watch`.
        """
        return read_media(
            media, frames, self.config, self.processor, consumer=consumer, num_threads=num_threads,
            keyframes=keyframes,
        )  # fmt: skip

    def watch_frames(self, frames: np.ndarray, times: np.ndarray, duration: float) -> "Video":
        """Like `watch`, for frames that were decoded elsewhere.

        Args:
          frames: uint8[F, R, R, 3].
          times: float32[F], seconds since the first frame of the video.
          duration: of the video, seconds; 0 for a picture.

        Raises:
          UserError: there are no frames, or the decoder has too few positions for them.
        """
        if not len(frames):
            raise UserError("there are no frames; give at least one")
        return self.watch_clips([Clip(frames, times, duration)])

    def watch_clips(
        self, clips: Sequence[Clip], *, encoding: Encoding | None = None,
        seconds: dict[str, float] | None = None,
    ) -> "Video":  # fmt: skip
        """Like `watch`, for media that are decoded. `encoding` was given all their frames, if there is one.

        With `seconds`, waits for each phase and adds its time.
        """
        prompt = self.prompt_of(clips)
        return Video(self, clips, prompt, self.prefix(prompt, clips, encoding, seconds), seconds)

    def with_room(self, cache: KVCache, tokens: int) -> KVCache:
        """`cache` with room for so many tokens per row, the padding of a question included."""
        return self.compiled.resize(cache, grown(cache.size, tokens)) if tokens > cache.size else cache

    def check_positions(self, cached: int, asked: int, room: int) -> None:
        """Raises a UserError unless there are positions for `asked` and `room` tokens after `cached`."""
        limit = self.config.decoder.max_positions
        if cached + asked + room > limit:
            raise UserError(
                f"the conversation has {cached} tokens, the question {asked} and the answer up to {room};"
                f" this model has {limit} positions: ask a shorter question, lower --max-new-tokens, or read"
                " fewer --frames"
            )

    def prompt_of(self, clips: Sequence[Clip]) -> TokenSequence:
        """The prompt about these media up to the question, with a place for each."""
        times, system_prompt = time_texts(clips, self.processor), self.processor.system_prompt
        return media_prefix(self.tokenizer, times, system_prompt=system_prompt)

    def prefix(
        self, prompt: TokenSequence, clips: Sequence[Clip], encoding: Encoding | None = None,
        seconds: dict[str, float] | None = None,
    ) -> Prefix:  # fmt: skip
        """Encodes the frames, unless `encoding` was given them, and runs the prompt; see `prefill`.

        With `seconds`, waits for both and adds their times to it.
        """
        begun, num_frames = time.perf_counter(), sum(len(clip.times) for clip in clips)
        check_frames(num_frames, self.config)
        check_memory(self.config, self.compiled.mesh, num_frames)
        parts = (encoding or Encoding(self.compiled, self.params)).encode(clips)
        if seconds is not None:
            jax.block_until_ready(parts)
            seconds["encode"], begun = time.perf_counter() - begun, time.perf_counter()
        prefix = self.prefill([prompt], [clips], [parts])
        if seconds is not None:
            jax.block_until_ready(prefix.cache)
            seconds["prefill"] = time.perf_counter() - begun
        return prefix

    def prefill(
        self, prompts: Sequence[TokenSequence], clips: Sequence[Sequence[Clip]],
        parts: Sequence[tuple[Visual, ...]],
    ) -> Prefix:  # fmt: skip
        """Runs prompts that end with a medium, or with its time instruction.

        Args:
          prompts: one per row.
          clips: the media of each row, in the order of their places in the prompt.
          parts: the encoded frames of each row, from `Encoding.finish`.

        Raises:
          UserError: the decoder has too few positions for a prompt.
        """
        config, processor, tokenizer = self.config, self.processor, self.tokenizer
        counts = [[len(clip.times) for clip in of_row] for of_row in clips]
        layouts = [
            lay_out(
                prompt, frames, tokens_per_frame=processor.tokens_per_frame, placeholder=tokenizer.video_pad
            )
            for prompt, frames in zip(prompts, counts, strict=True)
        ]
        for layout, frames in zip(layouts, counts, strict=True):
            if len(layout.tokens) + ANSWER_POSITIONS > config.decoder.max_positions:
                raise UserError(
                    f"{sum(frames)} frames and the text about them take {len(layout.tokens)} tokens; this"
                    f" model has {config.decoder.max_positions} positions: read fewer --frames, or give"
                    " --yarn, which scales its positions"
                )
        frames, text = max(map(sum, counts)), max(prompt.num_text_tokens for prompt in prompts)
        shape = prompt_shape(
            frames,
            text,
            tokens_per_frame=processor.tokens_per_frame,
            usual_text=usual_text(frames, tokenizer, processor),
        )
        rows = pad_rows(
            layouts, num_frames=shape.frames, num_text=shape.text, pad=tokenizer.pad,
            tokens_per_frame=processor.tokens_per_frame, placeholder=tokenizer.video_pad,
        )  # fmt: skip
        batch = Batch.create(
            tokens=rows.tokens, visual_slots=rows.visual_slots, visible_frames=rows.visible_frames
        )
        if all(len(of_row) == 1 for of_row in counts):
            batch = batch._replace(visible_frames=RowOrNone(rows.visible_frames))
        lengths = tuple(len(layout.tokens) for layout in layouts)
        cache = self.compiled.prefill(self.params, parts, batch, np.array(lengths, np.int32), shape)
        return Prefix(cache, lengths)

    def replies_to(self, prefix: Prefix, questions: Sequence[TokenSequence], options: Sequence[AnswerOptions]
    ) -> Generator[list[Reply], None, KVCache]:  # fmt: skip
        """Answers questions after a prefix, each row of which serves neighbouring questions; see `replies`.

        Raises:
          UserError: a question and its answer need more positions than the decoder has.
        """
        each, needed = len(questions) // len(prefix.lengths), 0
        for number, (question, option) in enumerate(zip(questions, options, strict=True)):
            cached, asked = prefix.lengths[number // each], len(question.ids)
            self.check_positions(cached, asked, option.max_new_tokens)
            # Padding of a question is written too, and overwritten by what comes next.
            needed = max(needed, cached + asked + option.max_new_tokens + QUESTION_TOKENS)
        ids, cache = [question.ids for question in questions], self.with_room(prefix.cache, needed)
        return replies(
            self.compiled, self.params, cache, ids, options, tokenizer=self.tokenizer, ends=self.ends
        )


class Video:
    """Encoded media. Questions are independent of each other, except in a `chat()`.

    Attributes:
      model: the model that watched.
      clips: the decoded media.
      seconds: of "decode" (the file to its last frame), "encode" (what was not encoded meanwhile) and
        "prefill", if `watch` was asked to time them.
      prompt: tokens up to the question, with a place for each medium.
      prefix: KV caches of the same.
    """

    def __init__(
        self, model: VideoModel, clips: Sequence[Clip], prompt: TokenSequence, prefix: Prefix,
        seconds: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """See `VideoModel.watch`, which makes it."""
        self.model = model
        self.clips = tuple(clips)
        self.seconds = seconds or {}
        self.prompt = prompt
        self.prefix = prefix

    @property
    def frames(self) -> np.ndarray:
        """uint8[F, R, R, 3], the frames of all media.

        Raises:
          UserError: their pixels were not kept, since there may be more than 512 of them.
        """
        if any(isinstance(clip, UnkeptClip) for clip in self.clips):
            raise UserError(
                "the pixels of a long video are not kept; read some of them again with"
                " video.frames_at([0, 100, 200])"
            )
        return stacked(self.clips)

    def frames_at(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8[n, R, R, 3] of some frames, numbered as in `frame_times`. A long video is read again.

        Raises:
          UserError: there is no such frame, numbers do not ascend, or the file cannot be read again.
        """
        wanted, count = np.asarray(numbers, np.int64), len(self.frame_times)
        if not wanted.size or wanted[0] < 0 or wanted[-1] >= count or (np.diff(wanted) < 0).any():
            raise UserError(f"frames {list(numbers)}: give ascending numbers from 0 to {count - 1}")
        return pixels_of(self.clips, wanted)

    @property
    def frame_times(self) -> np.ndarray:
        """float32[F], seconds since the first frame of their medium."""
        return np.concatenate([clip.times for clip in self.clips])

    def ask(self, question: str, **options: Unpack[Options]) -> str:
        """Answers one question, independently of others.

        Args:
          question: the question.
          **options: fields of `AnswerOptions`.

        Raises:
          UserError: the question is empty, question and answer need too many positions, or an option is out
            of range.
        """
        return self.answer(question, **options).text

    def answer(self, question: str, **options: Unpack[Options]) -> Answer:
        """Like `ask`, with the answer's length, end and time."""
        begun, option, model = time.perf_counter(), AnswerOptions(**options), self.model
        suffix = question_suffix(question, model.tokenizer, answer_prefix=option.answer_prefix)
        *_, (reply,) = model.replies_to(self.prefix, [suffix], [option])
        return Answer.of(reply, begun)

    def chat(self, **options: Unpack[Options]) -> "Chat":
        """Starts a conversation about this video; options as for `ask`."""
        return Chat(self, AnswerOptions(**options))

    def attention(self, question: str, *, answer_prefix: str = "") -> Float[np.ndarray, "x f p"]:
        """T2V attention of the last prompt token, which predicts the first token of the answer.

        Args:
          question: the question.
          answer_prefix: as of `ask`.

        Returns:
          float32[X, F, P], one map per layer with cross-attention: probabilities over all patches of all
          frames, averaged over heads. Each map sums to 1.

        Raises:
          UserError: the question is empty or needs too many positions, or this model has no T2V.
        """
        if "t2v" not in self.model.config.cross_attention.directions:
            raise UserError("--attention: this model has no T2V, so there is no attention to draw")
        model, cached = self.model, self.prefix.lengths[0]
        ids = question_suffix(question, model.tokenizer, answer_prefix=answer_prefix).ids
        model.check_positions(cached, len(ids), 1)
        cache = model.with_room(self.prefix.cache, cached + len(ids) + QUESTION_TOKENS)
        maps = model.compiled.observe(model.params, cache, ids)
        return np.asarray(maps)[:, 0, : len(self.frame_times)]


class _Said(NamedTuple):
    """A conversation up to the end of an answer, or before the first question."""

    prefix: Prefix
    prompt: TokenSequence  # the same as tokens, with a place for each medium
    clips: tuple[Clip, ...]
    answered: bool


class Chat:
    """A conversation about a video. Answers are streamed.

    A question counts as asked once its answer is complete: an answer that fails, or is not read to its end,
    leaves the conversation as it was.

    Attributes:
      last: the last complete answer, or None.
    """

    def __init__(self, video: Video, options: AnswerOptions) -> None:
        """Starts after the media of `video`, which is not modified."""
        self.last: Answer | None = None
        self._model, self._options = video.model, options
        self._said = _Said(video.prefix, video.prompt, video.clips, answered=False)
        self._before: tuple[_Said, str, tuple[Clip, ...], AnswerOptions] | None = None

    def ask(
        self, question: str, media: AnyMedia | None = None, *, frames: int | None = None
    ) -> Iterator[str]:
        """Yields the answer in pieces.

        Args:
          question: the question.
          media: further media that come with it, as for `VideoModel.watch`. All media are then encoded again.
          frames: of each of these videos; None: as in training.

        Raises:
          UserError: the question is empty, a medium cannot be read, or the conversation needs too many
            positions.
        """
        clips = () if media is None else read_everywhere(lambda: self._model.read(media, frames))
        yield from self._answer(self._said, question, clips, self._options)

    def regenerate(self, *, seed: int | None = None) -> Iterator[str]:
        """Yields another answer to the last question, which replaces the one that it had.

        Args:
          seed: of sampling; None: the next one. Without sampling the answer is the same.

        Raises:
          UserError: no question was answered yet.
        """
        if self._before is None:
            raise UserError("there is no answer to replace; ask a question first")
        said, question, clips, options = self._before
        options = dataclasses.replace(options, seed=options.seed + 1 if seed is None else seed)
        yield from self._answer(said, question, clips, options)

    def _answer(
        self, said: _Said, question: str, clips: tuple[Clip, ...], options: AnswerOptions
    ) -> Iterator[str]:
        begun, model, tokenizer = time.perf_counter(), self._model, self._model.tokenizer
        start = said
        if clips:  # frames are seen by what comes after them, so all media are in the prompt
            times = time_texts(clips, model.processor)
            prompt = said.prompt.followed_by(further_media(tokenizer, times, answered=said.answered))
            start = _Said(model.prefix(prompt, said.clips + clips), prompt, said.clips + clips, False)
        tokens_of = next_question if start.answered else question_suffix
        asked = tokens_of(question, tokenizer, answer_prefix=options.answer_prefix)
        steps, reply, shown = model.replies_to(start.prefix, [asked], [options]), None, 0
        while True:
            try:
                (reply,) = next(steps)
            except StopIteration as end:
                cache: KVCache = end.value
                break
            yield reply.text[shown:]
            shown = len(reply.text)
        assert reply is not None
        prompt = start.prompt.followed_by(asked).followed_by(TokenSequence.of_text(reply.ids))
        prefix = Prefix(cache, (start.prefix.lengths[0] + len(asked.ids) + len(reply.ids),))
        said_now, before = _Said(prefix, prompt, start.clips, answered=True), (said, question, clips, options)
        # Together: Ctrl-C leaves all of them as they were, or none.
        self._said, self._before, self.last = said_now, before, Answer.of(reply, begun)
