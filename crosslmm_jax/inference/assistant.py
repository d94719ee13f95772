"""Ask about a video: decode and encode it once, then answer any number of questions.

model = load("runs/demo")
video = model.watch("clip.mp4", frames=64)
print(video.ask("What is the man doing?"))
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

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
from crosslmm_jax.model import KVCache, Visual, init_params, logical_axes
from crosslmm_jax.model_folder import Processor, load_model_config, load_processor, load_weights
from crosslmm_jax.parallel import make_mesh, param_shardings

# Positions of the decoder that a video must not use: for questions and answers.
_RESERVED_POSITIONS = 256
# Tokens that are generated on the device before the host reads them; streaming shows this many at once.
_STREAM_CHUNK = 16


def load(folder: str | Path, precision: Precision | None = None) -> "VideoModel":
    """Loads a model. Its weights are sharded over all available devices.

    Args:
      folder: a MODEL folder, or a run's folder with one in `model/`.
      precision: of the matrix products of encoder and projector, and of the video KV cache. None: as
        config.json says.

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
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but DecoderConfig.vocab_size is"
            f" {config.decoder.vocab_size}; use the tokenizer that the model was trained with"
        )
    mesh = make_mesh(MeshConfig(data=1, tensor=-1))
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    shardings = param_shardings(logical_axes(config), shapes, mesh)
    # Cast to the compute dtype once here instead of at every use.
    params = load_weights(folder, config, shardings=shardings, dtype=config.compute_dtype)
    return VideoModel(config, prepare_params(params, config, mesh), tokenizer, processor, mesh)


class VideoModel:
    """A model that can watch videos. Made by `load`."""

    def __init__(
        self,
        config: ModelConfig,
        params: PyTree[Array],
        tokenizer: Tokenizer,
        processor: Processor,
        mesh: Mesh,
    ) -> None:
        """Takes parameters as `prepare_params` makes them, on the devices of `mesh`."""
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.processor = processor
        self.compiled = Compiled(config, mesh)

    def watch(self, path: str | Path, frames: int | None = None) -> "Video":
        """Decodes and encodes a video or picture. Each question then costs only its own tokens.

        Args:
          path: the file.
          frames: number of frames to read; None: as in training.

        Raises:
          UserError: the file is missing or not a video, or the decoder has too few positions for the frames.
        """
        sampling = self.processor.sampling
        if frames is not None:
            if frames < 1:
                raise UserError(f"--frames is {frames}; it must be 1 or more")
            sampling = SamplingConfig(policy="uniform", frames=frames)
        positions = self.config.decoder.max_positions - _RESERVED_POSITIONS
        limit = positions // self.config.merge.tokens_per_frame
        if sampling.most_frames > limit:
            raise UserError(
                f"--frames is {sampling.most_frames}; this model has positions for {limit} at most"
            )
        clip = read_frames(
            path, sampling, size=self.processor.image_size, num_threads=0,
            resampling=self.processor.resampling, deadline_s=None,
        )  # fmt: skip
        return self.watch_frames(clip.frames, clip.times, clip.duration)

    def watch_frames(self, frames: np.ndarray, times: np.ndarray, duration: float) -> "Video":
        """Like `watch`, for frames that were decoded elsewhere.

        Args:
          frames: uint8[F, R, R, 3].
          times: float32[F], seconds since the first frame of the video.
          duration: of the video, seconds; 0 for a picture.

        Raises:
          UserError: the decoder has too few positions for the frames.
        """
        return Video(self, frames, times, duration)


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer with its length and time."""

    text: str
    num_tokens: int  # generated, without the end token
    seconds: float  # from the question to the last token, with compilation if it is the first question

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over `seconds`."""
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


class Video:
    """An encoded video. Questions are independent of each other, except in a `chat()`."""

    def __init__(self, model: VideoModel, frames: np.ndarray, times: np.ndarray, duration: float) -> None:
        """Encodes the frames and prefills the prompt up to the question; see `VideoModel.watch_frames`."""
        self.model = model
        self.frames = frames
        self.frame_times = times
        processor = model.processor
        time = time_text(ClipMeta(len(frames), duration, times.tolist()), processor.time_instruction)
        prefix = video_prefix(model.tokenizer, system_prompt=processor.system_prompt, time_text=time)
        self._check_positions(prefix.num_text_tokens)
        visual = model.compiled.encode(model.params, frames[None])
        self._prefix = self._prefill(prefix, visual)

    def _check_positions(self, num_text_tokens: int) -> None:
        """Raises a UserError if frames and the text before the question need too many positions."""
        config = self.model.config
        used = len(self.frames) * config.merge.tokens_per_frame + num_text_tokens
        if used + _RESERVED_POSITIONS > config.decoder.max_positions:
            raise UserError(
                f"{len(self.frames)} frames and the text about them take {used} tokens; this model has"
                f" {config.decoder.max_positions} positions: read fewer --frames"
            )

    def _prefill(self, prefix: TokenSequence, visual: Visual) -> KVCache:
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
        """Answers one question, independently of others.

        Args:
          question: the question.
          max_new_tokens: longest answer, tokens.
          sampling: how tokens are drawn.
          seed: of sampling.

        Raises:
          UserError: the question is empty, question and answer need too many positions, or an argument is out
            of range.
        """
        return self.answer(question, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed).text

    def answer(
        self, question: str, *, max_new_tokens: int = 128, sampling: Sampling = Sampling(), seed: int = 0
    ) -> Answer:
        """Like `ask`, with the answer's length and time."""
        begin = time.perf_counter()
        chat = self.chat(max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
        text = "".join(chat.ask(question))
        return Answer(text, chat.num_tokens, time.perf_counter() - begin)

    def chat(self, *, max_new_tokens: int = 128, sampling: Sampling = Sampling(), seed: int = 0) -> "Chat":
        """Starts a conversation about this video; arguments as for `ask`."""
        return Chat(self.model, self._prefix, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)

    def attention(self, question: str) -> Float[np.ndarray, "x f p"]:
        """T2V attention of the last prompt token, which predicts the first token of the answer.

        Returns:
          float32[X, F, P], one map per layer with cross-attention: probabilities over all patches of all
          frames, averaged over heads. Each map sums to 1.

        Raises:
          UserError: the question is empty, or this model has no T2V.
        """
        if "t2v" not in self.model.config.cross_attention.directions:
            raise UserError("--attention: this model has no T2V, so there is no attention to draw")
        ids = question_suffix(question, self.model.tokenizer).ids
        maps = self.model.compiled.observe(self.model.params, self._prefix, ids)
        return np.asarray(maps)[:, 0]


class Chat:
    """A conversation about a video. Answers are streamed."""

    def __init__(
        self, model: VideoModel, prefix: KVCache, *, max_new_tokens: int, sampling: Sampling, seed: int
    ) -> None:
        """Starts after the tokens in `prefix`, which is not modified; other arguments as for `Video.ask`."""
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {max_new_tokens}; it must be 1 or more")
        if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
            raise UserError(
                f"--temperature {sampling.temperature} --top-p {sampling.top_p}:"
                " the temperature must be 0 or more, and top-p above 0 and at most 1"
            )
        self.num_tokens = 0  # length of the last answer
        self._model = model
        self._cache = prefix
        self._is_first = True
        self._max_new_tokens = max_new_tokens
        self._sampling = sampling
        self._key = jax.random.key(seed)

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer in pieces. Ask the next question only after the last piece.

        Raises:
          UserError: the question is empty, or the conversation needs too many positions.
        """
        model, tokens_of = self._model, question_suffix if self._is_first else next_question
        ids = tokens_of(question, model.tokenizer).ids
        self._check_positions(len(ids))
        self._key, key = jax.random.split(self._key)
        room = len(ids) + self._max_new_tokens
        state = model.compiled.begin(
            model.params, self._cache, ids, room=room, key=key, sampling=self._sampling,
            vocab_size=model.tokenizer.vocab_size, end=model.tokenizer.im_end, fresh=self._is_first,
        )  # fmt: skip
        self._is_first = False
        yield from self._stream(state)

    def _check_positions(self, num_question_tokens: int) -> None:
        cached = int(self._cache.num_tokens[0])
        limit = self._model.config.decoder.max_positions
        if cached + num_question_tokens + self._max_new_tokens > limit:
            raise UserError(
                f"the conversation has {cached} tokens, the question {num_question_tokens} and the answer up"
                f" to {self._max_new_tokens}; this model has {limit} positions: ask a shorter question, lower"
                " --max-new-tokens, or read fewer --frames"
            )

    def _stream(self, state: Generation) -> Iterator[str]:
        model, t2v = self._model, self._cache.t2v
        generated: list[int] = []
        shown = ""
        while len(generated) < self._max_new_tokens:
            limit = min(_STREAM_CHUNK, self._max_new_tokens - len(generated))
            tokens, count, state = model.compiled.generate(
                model.params, t2v, state, limit, self._sampling, steps=_STREAM_CHUNK,
                vocab_size=model.tokenizer.vocab_size, end=model.tokenizer.im_end,
            )  # fmt: skip
            generated += tokens
            self.num_tokens = len(generated)
            self._cache = state.cache._replace(t2v=t2v)
            finished = count < limit or bool(state.done[0])
            is_last = finished or len(generated) >= self._max_new_tokens
            text = _complete_text(model.tokenizer, generated, is_last=is_last)
            yield text[len(shown) :]
            shown = text
            if finished:
                return


def _complete_text(tokenizer: Tokenizer, ids: Sequence[int], *, is_last: bool) -> str:
    """The text of `ids`. Unless it `is_last`, a final character that still lacks bytes is left out."""
    text = tokenizer.decode(ids)
    return text if is_last else text.rstrip("\N{REPLACEMENT CHARACTER}")
