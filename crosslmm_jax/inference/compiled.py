"""Compiles the programs that answer questions, for a few static shapes.

Parameters have separate layers, as `separate_layers` makes them.

Text and cache are padded to multiples of a bucket, so that a growing conversation compiles few programs. The
T2V part of a cache belongs to the video and is shared by all questions: it is never donated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from crosslmm_jax.batch import Batch, with_known_visibility
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.inference.generate import Generation, Sampling, generate, start
from crosslmm_jax.model import CrossLMM, KVCache, VideoCache, Visual, apply
from crosslmm_jax.parallel import activation_rules, program

TEXT_BUCKET = 32  # tokens
CACHE_BUCKET = 256  # tokens


def round_up(size: int, bucket: int) -> int:
    """The smallest multiple of `bucket` that holds `size`."""
    return -(-size // bucket) * bucket


class _FrozenRules(dict):
    """Rules as a hashable value, so that a model can be a static argument."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items(), key=str)))


class Compiled:
    """The programs of one model on one mesh."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        """One device runs without sharding requests; several follow the table of logical axes."""
        rules = _FrozenRules(activation_rules()) if mesh.size > 1 else None
        self.model = CrossLMM(config, rules, stacked=False)
        self.mesh = mesh

    def encode(self, params: PyTree, frames: np.ndarray) -> Visual:
        """uint8[B, F, R, R, 3] to compact and original tokens."""
        with jax.set_mesh(self.mesh):
            return program(_encode)(self.model, params, frames)

    def prefill(self, params: PyTree, visual: Visual, batch: Batch[np.ndarray]) -> KVCache:
        """Runs a prompt without padding; the cache has room for its tokens only."""
        counts = np.full(batch.tokens.shape[0], batch.tokens.shape[1], np.int32)
        batch = with_known_visibility(batch, visual.originals.shape[1])
        with jax.set_mesh(self.mesh):
            return program(_prefill)(self.model, params, visual, batch, counts)

    def begin(
        self, params: PyTree, cache: KVCache, ids: np.ndarray, *, room: int, key: Array, sampling: Sampling,
        vocab_size: int, end: int, fresh: bool,
    ) -> Generation:  # fmt: skip
        """Adds a question to what `cache` holds and draws the first token of the answer.

        Args:
          params: the parameters.
          cache: of one row; reused unless `fresh` or too small.
          ids: int32[n], the question.
          room: tokens that question and answer need at most.
          key: for sampling.
          sampling: how tokens are drawn.
          vocab_size: the tokenizer's.
          end: the token that ends an answer.
          fresh: leave `cache` unchanged and use a copy.
        """
        # The cache needs room for the padding of the question too: it is written, and overwritten later.
        needed = int(cache.num_tokens[0]) + max(room, round_up(len(ids), TEXT_BUCKET))
        size = max(round_up(needed, CACHE_BUCKET), cache.size)
        with jax.set_mesh(self.mesh):
            of_text = cache._replace(t2v=None)
            if fresh or size > cache.size:
                of_text = _copy(of_text, size)
            logits, of_text = _extend(self.model, params, cache.t2v, of_text, *_padded(ids))
            return _start(logits, of_text, key, sampling, vocab_size=vocab_size, end=end)

    def observe(self, params: PyTree, cache: KVCache, ids: np.ndarray) -> Float[Array, "x b f p"]:
        """T2V attention of the last token of `ids`, which follow what `cache` holds."""
        tokens, counts = _padded(ids)
        needed = int(cache.num_tokens[0]) + tokens.shape[1]
        with jax.set_mesh(self.mesh):
            of_text = _copy(cache._replace(t2v=None), round_up(needed, CACHE_BUCKET))
            return _observe(self.model, params, cache.t2v, of_text, tokens, counts)

    def generate(
        self, params: PyTree, t2v: VideoCache | None, state: Generation, limit: int, sampling: Sampling, *,
        steps: int, vocab_size: int, end: int,
    ) -> tuple[list[int], int, Generation]:  # fmt: skip
        """Up to `limit` tokens of the one row: their ids, their number, and the state to continue from."""
        with jax.set_mesh(self.mesh):
            tokens, counts, state = generate(
                self.model, params, t2v, state, jnp.int32(limit), sampling,
                steps=steps, vocab_size=vocab_size, end=end,
            )  # fmt: skip
        count = int(counts[0])
        return np.asarray(tokens)[0, :count].tolist(), count, state


def _padded(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32[1, T] padded to a bucket, and int32[1] the number of tokens that are not padding."""
    tokens = np.zeros((1, round_up(len(ids), TEXT_BUCKET)), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens, np.array([len(ids)], np.int32)


def _encode(model: CrossLMM, params: PyTree, frames: Array) -> Visual:
    return apply(model, params, CrossLMM.encode, frames)


def _prefill(model: CrossLMM, params: PyTree, visual: Visual, batch: Batch[Array], counts: Array) -> KVCache:
    size = batch.tokens.shape[1]
    return apply(model, params, CrossLMM.prefill, visual, batch, counts, cache_size=size)[1]


@functools.partial(jax.jit, static_argnames="size")
def _copy(cache: KVCache, size: int) -> KVCache:
    """A copy with room for `size` tokens."""
    return cache.resized(size)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _extend(
    model: CrossLMM, params: PyTree, t2v: VideoCache | None, cache: KVCache, tokens: Array, counts: Array
) -> tuple[Array, KVCache]:
    logits, cache = apply(model, params, CrossLMM.extend, cache._replace(t2v=t2v), tokens, counts)
    return logits, cache._replace(t2v=None)


@functools.partial(jax.jit, static_argnames="model")
def _observe(
    model: CrossLMM, params: PyTree, t2v: VideoCache | None, cache: KVCache, tokens: Array, counts: Array
) -> Float[Array, "x b f p"]:
    return apply(model, params, CrossLMM.observe, cache._replace(t2v=t2v), tokens, counts)


_start = jax.jit(start, static_argnames=("vocab_size", "end"), donate_argnames="cache")
