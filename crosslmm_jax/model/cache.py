"""What generation keeps: self-attention keys and values, and T2V's keys and values of the video."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.cross_attention import KeysValues


class Cache(NamedTuple):
    """State between calls of `prefill` and `extend`; a pytree of static shapes, so that it can be donated."""

    keys: Float[Array, "l b s k h"]  # self-attention, S = room for all tokens
    values: Float[Array, "l b s k h"]
    lengths: Int[Array, " b"]  # tokens each row holds
    visible_frames: Int[Array, " b"]  # frames that further text may read
    t2v: KeysValues | None  # float[X, B, F, P, K, H] over the X layers with cross-attention


def empty_cache(config: ModelConfig, batch: int, size: int) -> Cache:
    """A cache with room for `size` tokens a row, visual ones counted, in the compute dtype."""
    decoder = config.decoder
    shape = (decoder.num_layers, batch, size, decoder.num_kv_heads, decoder.head_dim)
    dtype = jnp.dtype(config.compute_dtype)
    zeros = jnp.zeros((batch,), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zeros, zeros, None)
