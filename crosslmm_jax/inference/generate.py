"""Token by token on the device: sampling, and a loop that is compiled once for any length of text."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from crosslmm_jax.model import CrossLMM, KVCache, VideoCache, apply


class Sampling(NamedTuple):
    """How the next token is drawn; a pytree of scalars, so that changing it compiles nothing."""

    temperature: float | Array = 0.0  # 0: the most probable token
    top_p: float | Array = 1.0  # draw from the fewest tokens that hold this probability


class Generation(NamedTuple):
    """State of a generation. `token` is drawn but not yet in the cache."""

    cache: KVCache
    token: Int[Array, " b"]
    done: Bool[Array, " b"]  # `token` is the end of the answer, or comes after it
    key: Array


# Of `generate`: tokens so far, the tokens themselves, how many of each row count, and the state.
Loop = tuple[Int[Array, ""], Int[Array, "b s"], Int[Array, " b"], Generation]


def draw(logits: Float[Array, "b v"], key: Array, sampling: Sampling, *, vocab_size: int) -> Int[Array, " b"]:
    """int32[B] next tokens, never a row of the embedding beyond the tokenizer's `vocab_size`."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    # On a GPU, sorting a vocabulary takes many small kernels: done only where it changes the result.
    return jax.lax.cond(
        jnp.asarray(sampling.temperature) > 0,
        lambda: _draw_by_probability(logits, key, sampling),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _draw_by_probability(logits: Float[Array, "b v"], key: Array, sampling: Sampling) -> Int[Array, " b"]:
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
    ordered = jnp.sort(scaled, axis=-1, stable=False, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # A token stays while the more probable ones hold less than top_p; the first always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < sampling.top_p).at[..., 0].set(True)
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    drawn = jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf))
    return drawn.astype(jnp.int32)


def start(
    logits: Float[Array, "b v"], cache: KVCache, key: Array, sampling: Sampling, *, vocab_size: int, end: int
) -> Generation:
    """The first token after a prompt whose last logits are `logits`."""
    key, now = jax.random.split(key)
    token = draw(logits, now, sampling, vocab_size=vocab_size)
    return Generation(cache, token, token == end, key)


@functools.partial(jax.jit, static_argnames=("model", "steps", "vocab_size", "end"), donate_argnames="state")
def generate(
    model: CrossLMM,
    params: PyTree,
    t2v: VideoCache | None,
    state: Generation,
    limit: Int[Array, ""],
    sampling: Sampling,
    *,
    steps: int,
    vocab_size: int,
    end: int,
) -> tuple[Int[Array, "b s"], Int[Array, " b"], Generation]:
    """Up to `limit` tokens per row in one loop on the device.

    Args:
      model: the model.
      params: its parameters.
      t2v: video KV cache (`KVCache.t2v`), read only and so not donated.
      state: where the last call stopped; its cache has no T2V part and is reused.
      limit: int32, tokens to generate now, at most `steps`.
      sampling: how tokens are drawn.
      steps: static room for tokens.
      vocab_size: the tokenizer's.
      end: the token that ends an answer; it is neither returned nor put into the cache.

    Returns:
      int32[B, steps] tokens, int32[B] how many of them count, and the state to continue from.
    """

    def unfinished(carry: Loop) -> Array:
        i, _, _, state = carry
        return (i < limit) & ~jnp.all(state.done)

    def step(carry: Loop) -> Loop:
        i, tokens, counts, state = carry
        live = (~state.done).astype(jnp.int32)
        tokens = tokens.at[:, i].set(state.token)
        cache = state.cache._replace(t2v=t2v)
        logits, cache = apply(model, params, CrossLMM.extend, cache, state.token[:, None], live)
        state = Generation(cache._replace(t2v=None), state.token, state.done, state.key)
        following = start(logits, state.cache, state.key, sampling, vocab_size=vocab_size, end=end)
        return i + 1, tokens, counts + live, following._replace(done=state.done | following.done)

    batch = state.token.shape[0]
    carry = (jnp.int32(0), jnp.zeros((batch, steps), jnp.int32), jnp.zeros((batch,), jnp.int32), state)
    _, tokens, counts, state = jax.lax.while_loop(unfinished, step, carry)
    return tokens, counts, state
