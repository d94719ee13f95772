"""How large the activations of an encoder layer can be, by its weights alone.

LayerNorm's output before scale and bias has norm sqrt(D) at most, whatever it reads. So each number that the
layer's matrices read is bounded by its weights (Cauchy and Schwarz), and fp8 gets a scale that no input makes
too small, without a pass over activations or a calibration. The bound lies about sqrt(D), 34 at so400m's
width, above what is typical; e4m3 keeps its relative precision over a range of 2^15.

The exception is a token whose numbers all but equal their mean: its variance, from one pass in float32, is
rounding, and so is what LayerNorm makes of it. What lies beyond the bound is clipped (`quantise_by`).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# Rounding to e4m3 moves operands by up to 1/16 each, those of bfloat16 by less than 1/100 in all.
ROUNDING = 1.15


class Bounds(NamedTuple):
    """The largest magnitudes that the matrices of an encoder layer may read."""

    wq: Float[Array, ""]  # and wk, wv
    wo: Float[Array, ""]
    w1: Float[Array, ""]
    w2: Float[Array, ""]


def activation_bounds(layer: Mapping[str, Array]) -> Bounds:
    """Bounds of what the matrices of an encoder layer read, with its operands rounded to e4m3.

    Args:
      layer: weights of one layer, as `encoder_weights` names them.
    """
    w = {name: value.astype(jnp.float32) for name, value in layer.items()}
    norm1, norm2 = (w["norm1_scale"], w["norm1_bias"]), (w["norm2_scale"], w["norm2_bias"])
    return Bounds(
        wq=_of_norm(*norm1),
        wo=_of_linear(*norm1, w["wv"], w["bv"]),  # attention weighs values; weights sum to one
        w1=_of_norm(*norm2),
        w2=_of_linear(*norm2, w["w1"], w["b1"]),  # |gelu(x)| <= |x|
    )


def _of_norm(scale: Float[Array, " d"], bias: Float[Array, " d"]) -> Float[Array, ""]:
    return ROUNDING * jnp.max(math.sqrt(scale.size) * jnp.abs(scale) + jnp.abs(bias))


def _of_linear(
    scale: Float[Array, " d"], bias: Float[Array, " d"], matrix: Float[Array, "d ..."], offset: Array
) -> Float[Array, ""]:
    matrix, offset = matrix.reshape(scale.size, -1), jnp.abs(offset.reshape(-1))
    turned = math.sqrt(scale.size) * jnp.linalg.norm(scale[:, None] * matrix, axis=0)
    return ROUNDING * jnp.max(turned + jnp.abs(bias) @ jnp.abs(matrix) + offset)
