"""Operations that encoder and decoder share: norms, rotary positions, slots of tokens, matrix products."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MIN_ROWS = 8  # of a matrix product on a GPU


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
    """LayerNorm in float32, returned in the dtype of `x`.

    Mean and variance take one pass over `x`, as in Flax's LayerNorm, instead of two.
    """
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.maximum(jnp.mean(x32**2, axis=-1, keepdims=True) - mean**2, 0.0)
    return ((x32 - mean) * jax.lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)


def rotate(
    x: Float[Array, "b t n h"], positions: Int[Array, "b t"], *, theta: float
) -> Float[Array, "b t n h"]:
    """Rotary position embedding in Qwen2's form, on pairs of the first and the second half of a head."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


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


def with_fewest_rows(x: Float[Array, "b t d"]) -> Float[Array, "b u d"]:
    """`x` padded with zero tokens on a GPU, so that no product of it is padded (see `matmul`).

    Padded once before all layers, a norm is one kernel; padded at every product, three.
    """
    batch, tokens = x.shape[:2]
    if jax.default_backend() != "gpu":
        return x
    return pad_tokens(x, max(tokens, -(-MIN_ROWS // batch)))


def pad_tokens(x: Float[Array, "b t ..."], length: int) -> Float[Array, "b u ..."]:
    """`x` padded with zero tokens at the end, to `length`."""
    more = length - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)]) if more else x


def matmul(x: Float[Array, "*a d"], weight: Float[Array, "d e"], *, precise: bool = False) -> Array:
    """`x @ weight`, with a float32 result where `precise`.

    On a GPU, fewer than 8 rows are padded. XLA would compute a product of one row as an elementwise
    multiplication and a sum, and write an array of the size of the matrix, or a float32 copy of it, to
    memory.
    """
    rows, dtype = math.prod(x.shape[:-1]), jnp.float32 if precise else None
    if jax.default_backend() != "gpu" or rows >= MIN_ROWS:
        return jnp.matmul(x, weight, preferred_element_type=dtype)
    flat = jnp.pad(x.reshape(rows, -1), ((0, MIN_ROWS - rows), (0, 0)))
    return jnp.matmul(flat, weight, preferred_element_type=dtype)[:rows].reshape(*x.shape[:-1], -1)


def to_heads(x: Float[Array, "*a d"], weight: Float[Array, "d n h"], bias: Float[Array, "n h"]) -> Array:
    """float[..., N, H]: `x` by `weight`, plus `bias`.

    The matrices are two-dimensional: a GPU then adds the bias within the product, and XLA copies no operand
    into another order.
    """
    y = matmul(x, weight.reshape(weight.shape[0], -1)) + bias.reshape(-1)
    return y.reshape(*x.shape[:-1], *weight.shape[1:])


def from_heads(x: Float[Array, "*a n h"], weight: Float[Array, "n h d"]) -> Array:
    """float[..., D]: all heads of `x` by `weight`, as one product of two-dimensional matrices."""
    return matmul(x.reshape(*x.shape[:-2], -1), weight.reshape(-1, weight.shape[-1]))
