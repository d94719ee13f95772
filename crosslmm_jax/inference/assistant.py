"""Ask about a video: decode and encode it once, then answer as many questions as come.

model = load("runs/demo")
video = model.watch("clip.mp4", frames=64)
print(video.ask("What is the man doing?"))
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from crosslmm_jax.batch import Batch
from crosslmm_jax.config import MeshConfig, ModelConfig, Precision, SamplingConfig
from crosslmm_jax.data.media import read_frames
from crosslmm_jax.data.text import (
    ClipMeta,
    Tokenizer,
    TokenSequence,
    lay_out,
    load_tokenizer,
    next_question,
    question_suffix,
    time_text,
    video_prefix,
)
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.inference.compiled import Compiled
from crosslmm_jax.inference.generate import Generation, Sampling
from crosslmm_jax.inference.prepare import prepare_params
from crosslmm_jax.model import KVCache, init_params, logical_axes
from crosslmm_jax.model_folder import Processor, load_model_config, load_processor, load_weights
from crosslmm_jax.parallel import make_mesh, param_shardings

# Positions that are kept for questions and answers.
_CHAT_ROOM = 256
# Tokens that are made between two looks from the host: what streaming shows at once.
STREAM_CHUNK = 16


def load(folder: str | Path, precision: Precision | None = None) -> "VideoModel":
    """Config, weights and tokenizer of a MODEL folder (or of a run that holds one in `model/`).

    Weights are spread over all devices that are there.

    Args:
      folder: the MODEL.
      precision: of the encoder's and projector's products and of T2V's cache; None: as its config.json says.

    Raises:
      UserError: a file is missing or damaged, or the weights do not fit the config.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and (folder / "model" / "config.json").exists():
        folder = folder / "model"
    config, processor = load_model_config(folder), load_processor(folder)
    if precision is not None:
        config = config.at_precision(precision)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, DecoderConfig.vocab_size only"
            f" {config.decoder.vocab_size}; use the tokenizer that the model was trained with"
        )
    mesh = make_mesh(MeshConfig(data=1, tensor=-1))
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    shardings = param_shardings(logical_axes(config), shapes, mesh)
    # Matrices are cast to the compute dtype once here instead of at every use.
    params = load_weights(folder, config, shardings=shardings, dtype=config.compute_dtype)
    return VideoModel(config, prepare_params(params, config, mesh), tokenizer, processor, mesh)


class VideoModel:
    """A model that is ready to watch videos."""

    def __init__(
        self, config: ModelConfig, params: Any, tokenizer: Tokenizer, processor: Processor, mesh: Mesh
    ) -> None:
        """Takes parameters of `prepare_params` on the devices of `mesh`; `load` does all of it."""
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.processor = processor
        self.compiled = Compiled(config, mesh)

    def watch(self, path: str | Path, frames: int | None = None) -> "Video":
        """Decodes a video or picture and encodes it, so that questions cost only their own tokens.

        Args:
          path: a file.
          frames: how many to read; None reads them as in training.

        Raises:
          UserError: the file is missing or no video, or `frames` do not fit the decoder's positions.
        """
        sampling = self.processor.sampling
        if frames is not None:
            if frames < 1:
                raise UserError(f"--frames is {frames}; it must be 1 or more")
            sampling = SamplingConfig(policy="uniform", frames=frames)
        most = (self.config.decoder.max_positions - _CHAT_ROOM) // self.config.merge.tokens_per_frame
        if sampling.most_frames > most:
            raise UserError(f"--frames is {sampling.most_frames}; this model's positions hold at most {most}")
        clip = read_frames(
            path, sampling, size=self.processor.image_size, num_threads=0,
            resampling=self.processor.resampling, deadline_s=None,
        )  # fmt: skip
        return Video(self, clip.frames, clip.times, clip.duration)

    def watch_frames(self, frames: np.ndarray, times: np.ndarray, duration: float) -> "Video":
        """The same for frames decoded elsewhere.

        Args:
          frames: uint8[F, R, R, 3].
          times: float32[F], seconds since the first frame of the video.
          duration: of the video, seconds; 0 for a picture.

        Raises:
          UserError: they do not fit the decoder's positions.
        """
        return Video(self, frames, times, duration)


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer and what it took."""

    text: str
    num_tokens: int  # made, the end not counted
    seconds: float  # from the question to the last token, first-time compilation included

    @property
    def tokens_per_second(self) -> float:
        """Made tokens over all the time the question took."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


class Video:
    """An encoded video. Each question to it is independent; `chat()` remembers."""

    def __init__(self, model: VideoModel, frames: np.ndarray, times: np.ndarray, duration: float) -> None:
        """Encodes the frames and runs the prompt up to the video through the decoder; see `watch_frames`."""
        self.model = model
        self.frames = frames
        self.frame_times = times
        processor = model.processor
        time = time_text(ClipMeta(len(frames), duration, times.tolist()), processor.time_instruction)
        prefix = video_prefix(model.tokenizer, system_prompt=processor.system_prompt, time_text=time)
        self._check_room(prefix.num_text_tokens)
        visual = model.compiled.encode(model.params, frames[None])
        self._prefix = self._prefill(prefix, visual)

    def _check_room(self, text: int) -> None:
        """Raises UserError when frames and the prompt before the question leave no room for it."""
        config = self.model.config
        used = len(self.frames) * config.merge.tokens_per_frame + text
        if used + _CHAT_ROOM > config.decoder.max_positions:
            raise UserError(
                f"{len(self.frames)} frames and the words about them take {used} tokens; this model holds"
                f" {config.decoder.max_positions}: read fewer --frames"
            )

    def _prefill(self, prefix: TokenSequence, visual: Any) -> KVCache:
        model = self.model
        layout = lay_out(
            prefix, [len(self.frames)], tokens_per_frame=model.config.merge.tokens_per_frame,
            placeholder=model.tokenizer.video_pad,
        )  # fmt: skip
        slots = np.flatnonzero(layout.visual).astype(np.int32)
        batch = Batch.create(
            tokens=layout.tokens[None], visual_slots=slots[None], visible_frames=layout.visible_frames[None]
        )
        return model.compiled.prefill(model.params, visual, batch)

    def ask(
        self, question: str, *, max_new_tokens: int = 128, sampling: Sampling = Sampling(), seed: int = 0
    ) -> str:
        """The answer to one question; raises `UserError` when it is empty or too long."""
        return self.answer(question, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed).text

    def answer(
        self, question: str, *, max_new_tokens: int = 128, sampling: Sampling = Sampling(), seed: int = 0
    ) -> Answer:
        """Like `ask`, with the number of tokens and the time."""
        begin = time.perf_counter()
        chat = self.chat(max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
        text = "".join(chat.ask(question))
        return Answer(text, chat.num_tokens, time.perf_counter() - begin)

    def chat(self, *, max_new_tokens: int = 128, sampling: Sampling = Sampling(), seed: int = 0) -> "Chat":
        """A conversation about this video."""
        return Chat(self.model, self._prefix, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)

    def attention(self, question: str) -> np.ndarray:
        """float32[X, F, P]: what the last token of the prompt, which answers first, reads by T2V.

        Probabilities over all patches of all frames, mean over heads, one map for each of the X layers with
        cross-attention. They sum to 1 a layer.

        Raises:
          UserError: the question is empty, or this model has no T2V.
        """
        if "t2v" not in self.model.config.cross_attention.directions:
            raise UserError("--attention: this model runs without T2V, so there is no attention to draw")
        ids = question_suffix(question, self.model.tokenizer).ids
        maps = self.model.compiled.observe(self.model.params, self._prefix, ids)
        return np.asarray(maps)[:, 0]


class Chat:
    """A conversation that goes on from what was said; answers arrive as they are made."""

    def __init__(
        self, model: VideoModel, prefix: KVCache, *, max_new_tokens: int, sampling: Sampling, seed: int
    ) -> None:
        """Starts behind `prefix`, which stays as it is."""
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {max_new_tokens}; it must be 1 or more")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
            raise UserError(
                f"--temperature {sampling.temperature} --top-p {sampling.top_p}:"
                " the temperature must be 0 or more, and top-p above 0 and at most 1"
            )
        self.num_tokens = 0  # of the last answer
        self._model = model
        self._cache = prefix
        self._is_first = True
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._key = jax.random.key(seed)

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece; the conversation goes on when it is exhausted."""
        model, follow = self._model, question_suffix if self._is_first else next_question
        ids = follow(question, model.tokenizer).ids
        self._check_room(len(ids))
        self._key, key = jax.random.split(self._key)
        room = len(ids) + self._max_new_tokens
        state = model.compiled.begin(
            model.params, self._cache, ids, room=room, key=key, sampling=self._sampling,
            vocab_size=model.tokenizer.vocab_size, end=model.tokenizer.im_end, fresh=self._is_first,
        )  # fmt: skip
        self._is_first = False
        yield from self._stream(state)

    def _check_room(self, new: int) -> None:
        held = int(self._cache.num_tokens[0])
        most = self._model.config.decoder.max_positions
        if held + new + self._max_new_tokens > most:
            raise UserError(
                f"the conversation has {held} tokens, the question {new} and the answer up to"
                f" {self._max_new_tokens}; this model holds {most}: ask shorter, or read fewer --frames"
            )

    def _stream(self, state: Generation) -> Iterator[str]:
        model, t2v = self._model, self._cache.t2v
        made: list[int] = []
        shown = ""
        while len(made) < self._max_new_tokens:
            limit = min(STREAM_CHUNK, self._max_new_tokens - len(made))
            tokens, count, state = model.compiled.generate(
                model.params, t2v, state, limit, self._sampling, steps=STREAM_CHUNK,
                vocab_size=model.tokenizer.vocab_size, end=model.tokenizer.im_end,
            )  # fmt: skip
            made += tokens
            self.num_tokens = len(made)
            self._cache = state.cache._replace(t2v=t2v)
            finished = count < limit or bool(state.done[0])
            text = complete_text(model.tokenizer, made, finished or len(made) >= self._max_new_tokens)
            yield text[len(shown) :]
            shown = text
            if finished:
                return


def complete_text(tokenizer: Tokenizer, ids: Sequence[int], finished: bool) -> str:
    """Text of `ids`; while more may come, without a last character whose bytes are not all there yet."""
    text = tokenizer.decode(ids)
    return text if finished else text.rstrip("\N{REPLACEMENT CHARACTER}")
