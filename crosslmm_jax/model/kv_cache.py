"""What generation keeps: self-attention keys and values, and T2V's keys and values of the video."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.model.cross_attention import KeysValues
from crosslmm_jax.model.qwen2 import LayerCache


class Cache(NamedTuple):
    """State between calls of `prefill` and `extend`; a pytree of static shapes, so that it can be donated.

    Each layer has arrays of its own: out of a stack, a layer's keys would be copied to be read.
    """

    keys: tuple[Float[Array, "b s k h"], ...]  # self-attention, a layer each, S = room for all tokens
    values: tuple[Float[Array, "b s k h"], ...]
    lengths: Int[Array, " b"]  # tokens each row holds
    visible_frames: Int[Array, " b"]  # frames that further text may read
    t2v: tuple[KeysValues, ...] | None  # of the layers with cross-attention, float[B, F, P, K, H] each

    @property
    def size(self) -> int:
        """Room for tokens in a row, visual ones counted."""
        return self.keys[0].shape[1]

    def layer(self, index: int) -> LayerCache:
        """The part of one layer."""
        return LayerCache(self.keys[index], self.values[index], self.lengths)

    def resized(self, size: int) -> "Cache":
        """The same contents with room for `size` tokens a row, at least as many as before."""
        more = ((0, 0), (0, size - self.size), (0, 0), (0, 0))
        keys, values = (tuple(jnp.pad(x, more) for x in part) for part in (self.keys, self.values))
        return self._replace(keys=keys, values=values)
