"""Token merge and projector (paper sec. 3.1): P patches of a frame to C compact tokens of decoder width."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from crosslmm_jax.config import MergeConfig, Pooling, Precision
from crosslmm_jax.model.ops import layer_norm
from crosslmm_jax.model.params.tables import Weight, cast, declare, fan_in, ones, zeros
from crosslmm_jax.model.quantisation.quantise import linear, operand, quantised_table

# LayerNorm before the projector is an option of ours; torch's default epsilon.
INPUT_NORM_EPS = 1e-5


def pool(features: Float[Array, "n p w"], grid: int, pooling: Pooling) -> Float[Array, "n c w"]:
    """float[N, P, W] on a square grid to float[N, C, W] on a `grid` x `grid` one.

    Every pooling is linear and separable, so it is one small matrix; see `pooling_weights`.
    """
    side = round(features.shape[1] ** 0.5)
    along = pooling_weights(side, grid, pooling)
    weights = jnp.asarray(np.kron(along, along), jnp.float32)
    pooled = jnp.einsum("cp,npw->ncw", weights, features.astype(jnp.float32), precision="highest")
    return pooled.astype(features.dtype)


@functools.lru_cache
def pooling_weights(size: int, grid: int, pooling: Pooling) -> np.ndarray:
    """float64[grid, size]: how much of each of `size` inputs goes into each of `grid` outputs, on one axis.

    - average: torch's `adaptive_avg_pool2d`.
    - bilinear: torch's `interpolate(mode="bilinear", align_corners=False)`, which LLaVA runs. When it
      shrinks, it reads at most two inputs a side: 27 -> 3 just picks inputs 4, 13 and 22.
    - bilinear_antialias: the same with `antialias=True`, a triangle as wide as the shrinking factor.
    """
    weights = np.zeros((grid, size))
    scale = size / grid
    for i in range(grid):
        centre = scale * (i + 0.5)
        if pooling == "average":
            begin, end = i * size // grid, -(-(i + 1) * size // grid)
            weights[i, begin:end] = 1
        elif pooling == "bilinear":
            source = max(centre - 0.5, 0)
            low = min(int(source), size - 1)
            weights[i, low] += 1 - (source - low)
            weights[i, min(low + 1, size - 1)] += source - low
        else:
            width = max(scale, 1.0)
            begin, end = max(int(centre - width + 0.5), 0), min(int(centre + width + 0.5), size)
            positions = np.arange(begin, end)
            weights[i, begin:end] = np.maximum(0, 1 - np.abs(positions - centre + 0.5) / width)
    return weights / weights.sum(axis=1, keepdims=True)


def projector_weights(config: MergeConfig, vision_width: int, width: int) -> dict[str, Weight]:
    """Linear, GELU, Linear; with an input LayerNorm where the config asks for one."""
    table = {
        "w1": Weight((vision_width, width), ("vision_embed", "mlp"), fan_in(vision_width)),
        "b1": Weight((width,), ("mlp",), zeros),
        "w2": Weight((width, width), ("mlp", "embed"), fan_in(width)),
        "b2": Weight((width,), ("embed",), zeros),
    }
    if config.projector_input_norm:
        table["norm_scale"] = Weight((vision_width,), ("vision_embed",), ones)
        table["norm_bias"] = Weight((vision_width,), ("vision_embed",), zeros)
    return table


class Projector(nn.Module):
    """LLaVA's `mlp2x_gelu` with the exact GELU: vision width to decoder width."""

    config: MergeConfig
    vision_width: int
    width: int
    compute_dtype: str
    matmul: Precision = "compute"

    def setup(self) -> None:
        """Declares the parameters."""
        table = projector_weights(self.config, self.vision_width, self.width)
        self.weights = declare(self, quantised_table(table, self.matmul))

    def __call__(self, features: Float[Array, "... w"]) -> Float[Array, "... d"]:
        """float[..., W] to float[..., D]."""
        w = cast(dict(self.weights), jnp.dtype(self.compute_dtype))
        if self.config.projector_input_norm:
            features = layer_norm(features, w["norm_scale"], w["norm_bias"], eps=INPUT_NORM_EPS)
        hidden = jax.nn.gelu(linear(operand(features, w, "w1"), w, "w1", "b1"), approximate=False)
        return linear(operand(hidden, w, "w2"), w, "w2", "b2")
