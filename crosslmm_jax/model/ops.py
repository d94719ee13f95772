"""Small maths shared by encoder and decoder: plain functions on arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rms_normalise(x: Float[Array, "... d"], eps: float) -> Float[Array, "... d"]:
    """`x` over its root mean square, in float32, returned in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def rms_norm(x: Float[Array, "... d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "... d"]:
    """RMSNorm as in Qwen2: normalised in float32, cast back, then scaled."""
    return rms_normalise(x, eps) * scale.astype(x.dtype)


def layer_norm(
    x: Float[Array, "... d"], scale: Float[Array, " d"], bias: Float[Array, " d"], *, eps: float
) -> Float[Array, "... d"]:
    """LayerNorm in float32, returned in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)


def rotate(
    x: Float[Array, "b t n h"], positions: Int[Array, "b t"], *, theta: float
) -> Float[Array, "b t n h"]:
    """Rotary position embedding in Qwen2's form: the first half of a head turns against the second."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def gather_tokens(x: Float[Array, "b t d"], slots: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    """The tokens of `x` at `slots`."""
    return jnp.take_along_axis(x, slots[:, :, None], axis=1)


def add_at(
    x: Float[Array, "b t d"], slots: Int[Array, "b n"], update: Float[Array, "b n d"]
) -> Float[Array, "b t d"]:
    """`x` with `update` added at `slots`, which name each position at most once."""
    return jax.vmap(_add_row)(x, slots, update)


def _add_row(x: Array, slots: Array, update: Array) -> Array:
    return x.at[slots].add(update, unique_indices=True, mode="promise_in_bounds")
