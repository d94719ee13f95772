"""The KV cache of generation: self-attention's keys and values, and the video KV cache that T2V reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import ModelConfig


class KeysValues(NamedTuple):
    """Keys and values of all original tokens in one layer and direction.

    In 8 bits each head and channel has a scale. Scales go into the queries and into attention's output, so
    that keys and values are read as they are stored.
    """

    keys: Float[Array, "b f p k h"]
    values: Float[Array, "b f p k h"]
    key_scale: Float[Array, "b k h"] | None = None  # None: keys and values are in the compute dtype
    value_scale: Float[Array, "b k h"] | None = None

    def resized(self, frames: int) -> "KeysValues":
        """The same with room for `frames` frames, at least as many as before."""
        more = ((0, 0), (0, frames - self.keys.shape[1]), (0, 0), (0, 0), (0, 0))
        return self._replace(keys=jnp.pad(self.keys, more), values=jnp.pad(self.values, more))

    def written(self, new: "KeysValues", first: Array | int) -> "KeysValues":
        """The same with those of further frames from frame `first` on, where there must be room."""
        assert self.key_scale is None and new.key_scale is None, "scales of 8 bits are those of all frames"
        write = jax.lax.dynamic_update_slice_in_dim
        keys, values = write(self.keys, new.keys, first, 1), write(self.values, new.values, first, 1)
        return self._replace(keys=keys, values=values)


# The video KV cache: keys and values of T2V, one entry per layer with cross-attention.
VideoCache = tuple[KeysValues, ...]


class LayerCache(NamedTuple):
    """The KV cache of one layer."""

    keys: Float[Array, "b s k h"]  # S = room for all tokens
    values: Float[Array, "b s k h"]
    num_tokens: Int[Array, " b"]  # tokens in the cache per row: where new ones are written
    t2v: KeysValues | None = None  # None: the layer has no T2V, or there is no video

    def extended(self, k: Float[Array, "b t k h"], v: Float[Array, "b t k h"]) -> "LayerCache":
        """The cache with T new keys and values written after each row's tokens, where there must be room."""
        k, v = k.astype(self.keys.dtype), v.astype(self.values.dtype)
        if k.shape[0] == 1:
            # On a GPU, the kernel that makes a key also writes it to its place. A scatter would be another.
            write, start = jax.lax.dynamic_update_slice, (0, self.num_tokens[0], 0, 0)
            return self._replace(keys=write(self.keys, k, start), values=write(self.values, v, start))
        rows = jnp.arange(k.shape[0])[:, None]
        places = self.num_tokens[:, None] + jnp.arange(k.shape[1])
        keys = self.keys.at[rows, places].set(k, unique_indices=True)
        values = self.values.at[rows, places].set(v, unique_indices=True)
        return self._replace(keys=keys, values=values)


class KVCache(NamedTuple):
    """State between calls of `prefill` and `extend`: a pytree of static shapes, so that it can be donated.

    Every layer has arrays of its own. In a stack, XLA would copy a layer's keys to read them.
    """

    keys: tuple[Float[Array, "b s k h"], ...]  # self-attention, one entry per layer; S = room for all tokens
    values: tuple[Float[Array, "b s k h"], ...]
    num_tokens: Int[Array, " b"]  # tokens in the cache per row
    visible_frames: Int[Array, " b"]  # frames that further text sees
    # None: no T2V, no video, or passed beside this cache. May have fewer rows than the rest: each video then
    # belongs to as many neighbouring rows.
    t2v: VideoCache | None

    @classmethod
    def empty(cls, config: ModelConfig, size: int, frames: int) -> "KVCache":
        """A cache of one row that holds nothing, with room for `size` tokens and `frames` frames."""
        decoder, dtype = config.decoder, jnp.dtype(config.compute_dtype)
        heads = (decoder.num_kv_heads, decoder.head_dim)
        tokens = tuple(jnp.zeros((1, size, *heads), dtype) for _ in range(decoder.num_layers))
        video = jnp.zeros((1, frames, config.vision.num_patches, *heads), dtype)
        has_t2v = "t2v" in config.cross_attention.directions
        t2v = tuple(KeysValues(video, video) for _ in config.cross_attention_layers) if has_t2v else None
        none = jnp.zeros(1, jnp.int32)
        return cls(tokens, tokens, none, none, t2v)

    @property
    def size(self) -> int:
        """Room for tokens per row, visual ones included."""
        return self.keys[0].shape[1]

    def layer(self, index: int, cross_index: int | None) -> LayerCache:
        """The cache of one layer.

        Args:
          index: number of the decoder layer.
          cross_index: its number among the layers with cross-attention; None: it is not one of them.
        """
        t2v = None if self.t2v is None or cross_index is None else self.t2v[cross_index]
        return LayerCache(self.keys[index], self.values[index], self.num_tokens, t2v)

    def resized(self, size: int) -> "KVCache":
        """The same contents with room for `size` tokens per row, at least as many as before."""
        more = ((0, 0), (0, size - self.size), (0, 0), (0, 0))
        keys, values = (tuple(jnp.pad(x, more) for x in part) for part in (self.keys, self.values))
        return self._replace(keys=keys, values=values)

    def repeated(self, count: int) -> "KVCache":
        """The same with each row `count` times, one after another; T2V's part stays as it is."""
        if count == 1:
            return self
        rows = self._replace(t2v=None)
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), rows)._replace(t2v=self.t2v)
