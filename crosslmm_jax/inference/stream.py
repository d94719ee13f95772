"""A video that has not ended: frames are appended, and questions asked in between.

stream = Stream(model, most_frames=256)
for frames, times in follow("recording.mkv", size=model.processor.image_size):
    stream.append(frames, times)
print(stream.watched().ask("What has happened until now?"))
"""

from typing import Literal, TypeAlias, get_args

import numpy as np

from crosslmm_jax.data.media import Clip
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.assistant import Prefix, Video, VideoModel
from crosslmm_jax.inference.devices import check_memory
from crosslmm_jax.inference.generate import RowSettings
from crosslmm_jax.inference.shapes import (
    CACHE_ROOM,
    FRAMES_AT_ONCE,
    TOKEN_STEP,
    frames_at_once,
    round_up,
)
from crosslmm_jax.inference.watching import ANSWER_POSITIONS, check_frames
from crosslmm_jax.model import KVCache, Visual

WhenFull: TypeAlias = Literal["thin", "drop"]
DROPPED = 4  # "drop" lets go of one frame in so many; a stream keeps at least so many


class Stream:
    """Frames so far, encoded once each, and KV caches of fixed size.

    Only new frames are encoded and pass through the decoder. Frames that are appended together, up to 16, see
    each other and all before them; frames before them do not see them. So an appended frame costs the same,
    however long the video is, and answers equal those of one prefill with the same `visible_frames`.

    When there are `most_frames`, some are let go:

        thin    every second frame, and from then on every second of the new ones: all of the video stays in
                view, at half the rate each time
        drop    the oldest quarter: a window over the latest frames

    The frames that stay then pass through the decoder again, 16 at a time, from their kept tokens. Times are
    not told to the model: a time instruction says how long a video is, which is not known.

    Attributes:
      model: the model that watches.
      num_received: frames that were given to `append`.
    """

    def __init__(self, model: VideoModel, *, most_frames: int = 256, when_full: WhenFull = "thin") -> None:
        """Starts without a frame.

        Args:
          model: the model. Caches are in its compute dtype, at any precision of the rest.
          most_frames: frames to keep; memory is that of so many from the start.
          when_full: what is let go when there are more.

        Raises:
          UserError: the decoder has too few positions for `most_frames`, or the devices too little memory, or
            an argument is out of range.
        """
        if when_full not in get_args(WhenFull):
            raise UserError(f"when_full is {when_full!r}; it must be {' or '.join(get_args(WhenFull))}")
        if most_frames < DROPPED:
            raise UserError(f"most_frames is {most_frames}; it must be {DROPPED} or more")
        if model.config.cross_attention.cache_dtype != "compute":
            raise UserError(
                "frames cannot be appended to a video KV cache in 8 bits; load with precision='compute'"
            )
        check_frames(most_frames, model.config, given="most_frames is {}")
        check_memory(model.config, model.compiled.mesh, most_frames, stream=True)
        self.model = model
        self.num_received = 0
        self._most, self._when_full, self._stride = most_frames, when_full, 1
        size = model.processor.image_size
        self._buffer = np.zeros((most_frames, size, size, 3), np.uint8)  # what is in it is never changed
        self._times = np.zeros(0)
        self._prompt = model.prompt_of([Clip(self._frames, self._times, 0.0)])
        text, limit = len(self._prompt.ids) - 1, model.config.decoder.max_positions - ANSWER_POSITIONS
        if (fit := (limit - text) // model.processor.tokens_per_frame) < most_frames:
            raise UserError(
                f"most_frames is {most_frames}; beside {text} tokens of text this model has positions for"
                f" {fit} at most"
            )
        self._text, self._cache, self._kept = self._begin()

    def _begin(self) -> tuple[Prefix, KVCache, Visual]:
        """The prompt up to its video; the same as a cache with room for all frames; the tokens of none."""
        model, before = self.model, self._prompt.ids[:-1]
        assert self._prompt.num_media == 1 and self._prompt.ids[-1] < 0  # the video comes last
        frames = self._most + max(FRAMES_AT_ONCE)  # the padding of the last ones too
        tokens = frames * model.processor.tokens_per_frame + len(before) + CACHE_ROOM
        cache = model.compiled.empty(round_up(tokens, TOKEN_STEP), frames)
        *_, state = model.compiled.read(
            model.params, cache, [before], RowSettings.of(), vocab_size=model.tokenizer.vocab_size
        )
        cache = state.cache._replace(t2v=cache.t2v)
        return Prefix(cache._replace(t2v=None), (len(before),)), cache, model.compiled.blank_tokens(frames)

    @property
    def frame_times(self) -> np.ndarray:
        """float64[F], seconds of the frames that are kept."""
        return self._times

    @property
    def _frames(self) -> np.ndarray:
        return self._buffer[: len(self._times)]

    def append(self, frames: np.ndarray, times: np.ndarray) -> None:
        """Adds frames at the end.

        Args:
          frames: uint8[n, R, R, 3].
          times: float[n], seconds, ascending; from any start, such as a clock's.

        Raises:
          UserError: frames have another shape or dtype, or times do not ascend.
        """
        frames, times = np.asarray(frames), np.asarray(times, np.float64)
        if times.ndim != 1 or not np.isfinite(times).all():
            raise UserError("times are no list of seconds; give a finite number for each frame")
        shape = (len(times), *self._buffer.shape[1:])
        if frames.shape != shape or frames.dtype != np.uint8:
            raise UserError(f"frames are {frames.dtype}{list(frames.shape)}; give uint8{list(shape)}")
        every = np.concatenate([self._times[-1:], times])
        if not (np.diff(every) > 0).all():
            raise UserError("times of frames do not ascend; append each frame after those before it")
        while len(frames):
            numbers = np.arange(self.num_received, self.num_received + len(frames))
            wanted, room = np.flatnonzero(numbers % self._stride == 0), self._most - len(self._frames)
            if len(wanted) and not room:
                self._let_go()
                continue
            # Up to the frame that fills the room: which of the others are wanted depends on it.
            until = len(frames) if len(wanted) <= room else int(wanted[room])
            self._add(frames[wanted[:room]], times[wanted[:room]])
            self.num_received += until
            frames, times = frames[until:], times[until:]

    def _add(self, frames: np.ndarray, times: np.ndarray) -> None:
        """Encodes frames, for which there is room."""
        model, compiled = self.model, self.model.compiled
        for begin in range(0, len(frames), max(FRAMES_AT_ONCE)):
            some = frames[begin : begin + max(FRAMES_AT_ONCE)]
            padded = np.zeros((1, frames_at_once(len(some)), *some.shape[1:]), np.uint8)
            padded[0, : len(some)] = some
            new = compiled.encode(model.params, padded)
            count = len(self._times)
            self._kept = compiled.keep(self._kept, new, count)
            self._cache = compiled.append(model.params, self._cache, self._kept, new, len(some))
            self._buffer[count : count + len(some)] = some
            self._times = np.concatenate([self._times, times[begin : begin + len(some)]])

    def _let_go(self) -> None:
        """Makes room; what stays passes through the decoder again."""
        count = len(self._frames)
        if self._when_full == "thin":
            self._stride *= 2
            stay = np.arange(0, count, 2)
        else:
            stay = np.arange(count // DROPPED, count)
        model, tokens = self.model, self.model.processor.tokens_per_frame
        # What is left of T2V's part is overwritten. No more than two caches exist at a time.
        self._cache = self._text.cache._replace(t2v=self._cache.t2v)
        kept, room = self._kept, self._kept.originals.shape[1]
        order = np.concatenate([stay, np.full(room - len(stay), stay[-1])])  # one shape for any number
        compact = kept.compact.reshape(1, room, tokens, -1)[:, order].reshape(kept.compact.shape)
        self._kept = kept = Visual(compact, kept.originals[:, order])
        size = max(FRAMES_AT_ONCE)
        for begin in range(0, len(stay), size):
            some = Visual(
                kept.compact[:, begin * tokens : (begin + size) * tokens],
                kept.originals[:, begin : begin + size],
            )
            number = min(size, len(stay) - begin)
            self._cache = model.compiled.append(model.params, self._cache, kept, some, number)
        buffer = np.zeros_like(self._buffer)
        buffer[: len(stay)] = self._buffer[stay]
        self._buffer, self._times = buffer, self._times[stay]

    def watched(self) -> Video:
        """The video until now. It stays as it is when frames are appended later.

        Raises:
          UserError: there are no frames yet.
        """
        if not len(self._frames):
            raise UserError("there are no frames yet; append some before asking")
        length = int(self._prompt.num_text_tokens) + len(self._frames) * self.model.processor.tokens_per_frame
        clip = Clip(self._frames, self._times, float(self._times[-1]))
        return Video(self.model, [clip], self._prompt, Prefix(self._cache, (length,)))
