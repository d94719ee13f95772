"""Token by token on the device: sampling per row, and a loop that is compiled once for any length of text."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from crosslmm_jax.model import CrossLMM, KVCache, VideoCache, apply

USUAL_ENDS = 8  # room for tokens that end an answer, so that programs do not depend on how many there are


class Sampling(NamedTuple):
    """How the next token is drawn."""

    temperature: float = 0.0  # 0: the most probable token
    top_p: float = 1.0  # draw from the fewest tokens that hold this probability


class RowSettings(NamedTuple):
    """Settings of each row's answer: a pytree of arrays, so that changing them compiles nothing.

    A row's draws depend on its own seed and on the number of tokens it has drawn, not on its neighbours.
    """

    temperature: Array | np.ndarray  # float32[B]
    top_p: Array | np.ndarray  # float32[B]
    seed: Array | np.ndarray  # uint32[B]
    limit: Array | np.ndarray  # int32[B], most tokens of the answer
    ends: Array | np.ndarray  # int32[B, E], tokens that end it; E = USUAL_ENDS or more, filled with -1

    @classmethod
    def of(
        cls, sampling: Sampling = Sampling(), *, seed: int = 0, limit: int = 0, ends: Sequence[int] = ()
    ) -> "RowSettings":
        """The settings of one row, as numpy arrays."""
        padded = np.full((1, max(USUAL_ENDS, len(ends))), -1, np.int32)
        padded[0, : len(ends)] = ends
        return cls(
            np.full(1, sampling.temperature, np.float32), np.full(1, sampling.top_p, np.float32),
            np.full(1, seed % 2**32, np.uint32), np.full(1, limit, np.int32), padded,
        )  # fmt: skip

    @classmethod
    def joined(cls, rows: "Sequence[RowSettings]") -> "RowSettings":
        """The rows of all of `rows`."""
        return cls(*(np.concatenate(of_rows) for of_rows in zip(*rows, strict=True)))


class Generation(NamedTuple):
    """State of B answers. `token` is drawn but not yet in the cache."""

    cache: KVCache  # without its T2V part
    token: Int[Array, " b"]
    count: Int[Array, " b"]  # tokens of the answer in the cache
    ended: Bool[Array, " b"]  # `token` ends the answer


# Of `generate`: step, the tokens so far, and the state.
Loop = tuple[Int[Array, ""], Int[Array, "b s"], Generation]


def draw(logits: Float[Array, "b v"], rows: RowSettings, count: Int[Array, " b"]) -> Int[Array, " b"]:
    """int32[B], the next token of each row after `count` tokens. Logits of -inf are never drawn."""

    def by_probability() -> Array:
        keys = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(rows.seed, count)
        settings = jnp.asarray(rows.temperature), jnp.asarray(rows.top_p)
        drawn = jax.vmap(_draw_by_probability)(logits, keys, *settings)
        return jnp.where(rows.temperature > 0, drawn, greedy())

    def greedy() -> Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    # On a GPU, sorting a vocabulary takes many small kernels: done only where it changes the result.
    return jax.lax.cond(jnp.any(rows.temperature > 0), by_probability, greedy)


def _draw_by_probability(logits: Float[Array, " v"], key: Array, temperature: Array, top_p: Array) -> Array:
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled, axis=-1, stable=False, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # A token stays while the more probable ones hold less than top_p; the first always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p).at[0].set(True)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf))
    return jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf)).astype(jnp.int32)


def start(
    logits: Float[Array, "b v"],
    cache: KVCache,
    rows: RowSettings,
    count: Int[Array, " b"],
    *,
    vocab_size: int,
) -> Generation:
    """The state after `count` tokens of each answer, where `logits` are those of the next token.

    Args:
      logits: float32[B, V].
      cache: all tokens so far, without its T2V part.
      rows: settings of each row.
      count: int32[B].
      vocab_size: the tokenizer's; a row of the embedding beyond it is never drawn.
    """
    token = draw(jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf), rows, count)
    return Generation(cache, token, count, jnp.any(token[:, None] == rows.ends, axis=1))


@functools.partial(jax.jit, static_argnames=("model", "steps", "vocab_size"), donate_argnames="state")
def generate(
    model: CrossLMM,
    params: PyTree,
    t2v: VideoCache | None,
    state: Generation,
    rows: RowSettings,
    *,
    steps: int,
    vocab_size: int,
) -> tuple[Int[Array, "b s"], Bool[Array, " b"], Generation]:
    """Up to `steps` further tokens per row in one loop on the device; none for a row that has finished.

    Args:
      model: the model.
      params: its parameters.
      t2v: video KV cache (`KVCache.t2v`), read only and so not donated. With fewer rows than the state, each
        video is read by B / rows neighbouring rows.
      state: where the last call stopped; donated.
      rows: settings of each row.
      steps: static, most tokens of this call.
      vocab_size: the tokenizer's.

    Returns:
      int32[B, steps] tokens, -1 after the last one of a row; bool[B], whether an end token follows, which is
      neither returned nor put into the cache; and the state to continue from.
    """

    def live(state: Generation) -> Bool[Array, " b"]:
        return ~state.ended & (state.count < rows.limit)

    def unfinished(carry: Loop) -> Array:
        i, _, state = carry
        return (i < steps) & jnp.any(live(state))

    def step(carry: Loop) -> Loop:
        i, tokens, state = carry
        going = live(state)
        tokens = tokens.at[:, i].set(jnp.where(going, state.token, -1))
        added, cache = going.astype(jnp.int32), state.cache._replace(t2v=t2v)
        logits, cache = apply(model, params, CrossLMM.extend, cache, state.token[:, None], added)
        following = start(logits, cache._replace(t2v=None), rows, state.count + added, vocab_size=vocab_size)
        return i + 1, tokens, following._replace(ended=state.ended | (going & following.ended))

    tokens = jnp.full((state.token.shape[0], steps), -1, jnp.int32)
    _, tokens, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), tokens, state))
    return everywhere(model, tokens), everywhere(model, state.ended), state


def everywhere(model: CrossLMM, array: Array) -> Array:
    """An array that every process can read."""
    if model.rules is None:
        return array
    return jax.lax.with_sharding_constraint(array, jax.sharding.PartitionSpec())
