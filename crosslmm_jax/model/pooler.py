"""The pooler (paper sec. 3.1): token merge, P patches to C compact tokens per frame, and the projector."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from crosslmm_jax.config import MergeConfig, ModelConfig, Pooling
from crosslmm_jax.model.ops import layer_norm, rms_normalise
from crosslmm_jax.model.params.tables import Weight, cast, declare, fan_in, ones, zeros
from crosslmm_jax.model.quantisation.quantise import linear, operand, quantised_table

# Of the optional LayerNorm before the projector, which LLaVA does not have: torch's default.
INPUT_NORM_EPS = 1e-5


def pool(features: Float[Array, "n p w"], grid: int, pooling: Pooling) -> Float[Array, "n c w"]:
    """float[n, P, W], n frames (B*F), to float[n, C, W]: square frames, C = `grid` squared.

    Every pooling is linear and separable, so that one small matrix does it: see `pooling_weights`.
    """
    side = round(features.shape[1] ** 0.5)
    along = pooling_weights(side, grid, pooling)
    weights = jnp.asarray(np.kron(along, along), jnp.float32)
    pooled = jnp.einsum("cp,npw->ncw", weights, features.astype(jnp.float32), precision="highest")
    return pooled.astype(features.dtype)


@functools.lru_cache
def pooling_weights(size: int, grid: int, pooling: Pooling) -> np.ndarray:
    """float64[grid, size]: the weight of each of `size` inputs in each of `grid` outputs, along one axis.

    - average: torch's `adaptive_avg_pool2d`.
    - bilinear: torch's `interpolate(mode="bilinear", align_corners=False)`, which LLaVA runs. It reads
      at most two inputs per output: 27 -> 3 only picks inputs 4, 13 and 22.
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
            position = max(centre - 0.5, 0)
            low = min(int(position), size - 1)
            weights[i, low] += 1 - (position - low)
            weights[i, min(low + 1, size - 1)] += position - low
        else:
            width = max(scale, 1.0)
            begin, end = max(int(centre - width + 0.5), 0), min(int(centre + width + 0.5), size)
            positions = np.arange(begin, end)
            weights[i, begin:end] = np.maximum(0, 1 - np.abs(positions - centre + 0.5) / width)
    return weights / weights.sum(axis=1, keepdims=True)


def projector_weights(config: MergeConfig, vision_width: int, width: int) -> dict[str, Weight]:
    """Linear, GELU, Linear; an input LayerNorm where the config asks for one."""
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


class Pooler(nn.Module):
    """Token merge, then LLaVA's `mlp2x_gelu` with the exact GELU: vision width to decoder width."""

    config: ModelConfig

    def setup(self) -> None:
        """Declares the parameters, which are the projector's."""
        c = self.config
        table = projector_weights(c.merge, c.vision.width, c.decoder.width)
        self.weights = declare(self, quantised_table(table, c.visual_matmul))

    def __call__(
        self, features: Float[Array, "n p w"]
    ) -> tuple[Float[Array, "n c d"], Float[Array, "n p d"]]:
        """Compact tokens of n frames (B*F), and their original tokens at unit root mean square, for K/V.

        With `kv_source="encoder"` the original tokens are the features themselves, of width W.
        """
        c = self.config
        with jax.named_scope("pool"):
            pooled = pool(features, c.merge.grid, c.merge.pooling)
        with jax.named_scope("projector"):
            compact = self.project(pooled)
            originals = self.project(features) if c.cross_attention.kv_source == "projected" else features
            return compact, rms_normalise(originals, c.decoder.rms_norm_eps)

    def project(self, features: Float[Array, "... w"]) -> Float[Array, "... d"]:
        """float[..., W] to float[..., D]."""
        w = cast(dict(self.weights), jnp.dtype(self.config.compute_dtype))
        if self.config.merge.projector_input_norm:
            features = layer_norm(features, w["norm_scale"], w["norm_bias"], eps=INPUT_NORM_EPS)
        hidden = jax.nn.gelu(linear(operand(features, w, "w1"), w, "w1", "b1"), approximate=False)
        return linear(operand(hidden, w, "w2"), w, "w2", "b2")
