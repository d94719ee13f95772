"""Operations that encoder and decoder share: norms, rotary positions, slots of tokens, matrix products."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from crosslmm_jax.model.params.low_rank import Adapted, Matrix, as_matrix

MIN_ROWS = 8  # of a matrix product on a GPU
YARN_FAST, YARN_SLOW = 32, 1  # turns within the trained positions, between which YaRN's ramp lies


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


class Rotary(NamedTuple):
    """A rotary position embedding of heads of size H."""

    theta: float  # base
    frequencies: Float[np.ndarray, " half"]  # float32[H / 2], radians per position
    scale: float = 1.0  # of what is rotated

    @classmethod
    def of(cls, theta: float, head_dim: int) -> "Rotary":
        """The embedding with base `theta`."""
        # At position 100,000 the last bit of a frequency moves the angle by 0.004. So powers are float64's,
        # rounded once: with few exceptions those of torch.
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        return cls(theta, 1 / (float(theta) ** exponents.astype(np.float64)).astype(np.float32))

    def with_yarn(self, *, factor: float, trained_positions: int) -> "Rotary":
        """The same for `factor` times as many positions as it was trained with (YaRN, arXiv:2309.00071).

        Frequencies of less than one turn within the trained positions are divided by `factor`, those of more
        than 32 turns stay, and a linear ramp lies between. Queries and keys are scaled by 0.1 ln(factor) + 1.
        These are the constants that Qwen2.5 documents and transformers uses.
        """

        def pair_that_turns(times: float) -> float:
            return half * math.log(trained_positions / (times * 2 * math.pi)) / math.log(self.theta)

        half = len(self.frequencies)
        first = max(math.floor(pair_that_turns(YARN_FAST)), 0)
        last = min(math.ceil(pair_that_turns(YARN_SLOW)), 2 * half - 1)
        width = (last - first) or 0.001
        kept = 1 - np.clip((np.arange(half, dtype=np.float32) - first) / np.float32(width), 0, 1)
        frequencies = self.frequencies / np.float32(factor) * (1 - kept) + self.frequencies * kept
        return Rotary(self.theta, frequencies, 0.1 * math.log(factor) + 1)


def rotate(
    x: Float[Array, "b t n h"], positions: Int[Array, "b t"], rotary: Rotary
) -> Float[Array, "b t n h"]:
    """Rotary position embedding in Qwen2's form, on pairs of the first and the second half of a head."""
    angles = positions.astype(jnp.float32)[:, :, None, None] * rotary.frequencies
    sin, cos = rotary.scale * jnp.sin(angles), rotary.scale * jnp.cos(angles)
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


def matmul(x: Float[Array, "*a d"], weight: Matrix, *, precise: bool = False) -> Array:
    """`x @ weight`, D inputs by E outputs, with a float32 result where `precise`.

    On a GPU, fewer than 8 rows are padded. XLA would compute a product of one row as an elementwise
    multiplication and a sum, and write an array of the size of the matrix, or a float32 copy of it, to
    memory.
    """
    if isinstance(weight, Adapted):
        low = weight.low_rank
        return matmul(x, weight.base, precise=precise) + low.scale * matmul(
            matmul(x, low.a), low.b, precise=precise
        )
    rows, dtype = math.prod(x.shape[:-1]), jnp.float32 if precise else None
    if jax.default_backend() != "gpu" or rows >= MIN_ROWS:
        return jnp.matmul(x, weight, preferred_element_type=dtype)
    flat = jnp.pad(x.reshape(rows, -1), ((0, MIN_ROWS - rows), (0, 0)))
    return jnp.matmul(flat, weight, preferred_element_type=dtype)[:rows].reshape(*x.shape[:-1], -1)


def to_heads(x: Float[Array, "*a d"], weight: Matrix, bias: Float[Array, "n h"]) -> Array:
    """float[..., N, H]: `x` by `weight`, float[D, N, H], plus `bias`.

    The matrices are two-dimensional: a GPU then adds the bias within the product, and XLA copies no operand
    into another order.
    """
    y = matmul(x, as_matrix(weight, 1)) + bias.reshape(-1)
    return y.reshape(*x.shape[:-1], *weight.shape[1:])


def from_heads(x: Float[Array, "*a n h"], weight: Matrix) -> Array:
    """float[..., D]: all heads of `x` by `weight`, float[N, H, D], as one product of matrices."""
    return matmul(x.reshape(*x.shape[:-2], -1), as_matrix(weight, 2))
