"""Bounds of the activations of an encoder layer, from its weights alone.

Before scale and bias, the output of LayerNorm has norm sqrt(D) at most, whatever its input. So the weights
bound every input of the layer's matrices (Cauchy-Schwarz), and fp8 gets a scale that is large enough for any
input, without a pass over activations or a calibration. The bound is about sqrt(D) times typical values, 34
at so400m's width; e4m3 keeps its relative precision over a range of 2^15.

The exception is a token whose numbers are nearly equal: its variance, computed in one float32 pass, is a
rounding error, and so is the output of LayerNorm. Values beyond the bound are clipped (`quantise_by`).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

# Rounding to e4m3 changes each operand by up to 1/16, rounding to bfloat16 all of them by less than 1/100.
ROUNDING = 1.15


class Bounds(NamedTuple):
    """Largest magnitudes of the inputs of an encoder layer's matrices."""

    wq: Float[Array, ""]  # and wk, wv
    wo: Float[Array, ""]
    w1: Float[Array, ""]
    w2: Float[Array, ""]


def activation_bounds(layer: Mapping[str, Array]) -> Bounds:
    """Bounds of the inputs of an encoder layer's matrices, with operands rounded to e4m3.

    Args:
      layer: weights of one layer, as `encoder_weights` names them.
    """
    w = {name: value.astype(jnp.float32) for name, value in layer.items()}
    norm1, norm2 = (w["norm1_scale"], w["norm1_bias"]), (w["norm2_scale"], w["norm2_bias"])
    return Bounds(
        wq=_norm_bound(*norm1),
        wo=_linear_bound(*norm1, w["wv"], w["bv"]),  # attention weights sum to one
        w1=_norm_bound(*norm2),
        w2=_linear_bound(*norm2, w["w1"], w["b1"]),  # |gelu(x)| <= |x|
    )


def _norm_bound(scale: Float[Array, " d"], bias: Float[Array, " d"]) -> Float[Array, ""]:
    return ROUNDING * jnp.max(math.sqrt(scale.size) * jnp.abs(scale) + jnp.abs(bias))


def _linear_bound(
    scale: Float[Array, " d"], bias: Float[Array, " d"], matrix: Float[Array, "d ..."], offset: Array
) -> Float[Array, ""]:
    matrix, offset = matrix.reshape(scale.size, -1), jnp.abs(offset.reshape(-1))
    products = math.sqrt(scale.size) * jnp.linalg.norm(scale[:, None] * matrix, axis=0)
    return ROUNDING * jnp.max(products + jnp.abs(bias) @ jnp.abs(matrix) + offset)
