"""SigLIP2 vision encoder: frames to patch features, with the layer stack as one scan.

Reference implementation: Hugging Face's `SiglipVisionModel` (no class token, learned positions, pre-norm,
tanh-approximated GELU). The attention-pooling head is not part of it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from crosslmm_jax.config import AttentionBackend, VisionConfig
from crosslmm_jax.model.attention import attention
from crosslmm_jax.model.ops import layer_norm
from crosslmm_jax.model.weights import Weight, WeightTable, cast, declare, fan_in, normal, ones, stack, zeros


def encoder_weights(config: VisionConfig) -> WeightTable:
    """Parameters of the tower, up to and including the layer that features are read from."""
    W, N, H, M = config.width, config.num_heads, config.head_dim, config.mlp_width
    pixels = 3 * config.patch_size**2
    layer = {
        "norm1_scale": Weight((W,), ("vision_embed",), ones),
        "norm1_bias": Weight((W,), ("vision_embed",), zeros),
        "wq": Weight((W, N, H), ("vision_embed", "vision_heads", "vision_head_dim"), fan_in(W)),
        "bq": Weight((N, H), ("vision_heads", "vision_head_dim"), zeros),
        "wk": Weight((W, N, H), ("vision_embed", "vision_heads", "vision_head_dim"), fan_in(W)),
        "bk": Weight((N, H), ("vision_heads", "vision_head_dim"), zeros),
        "wv": Weight((W, N, H), ("vision_embed", "vision_heads", "vision_head_dim"), fan_in(W)),
        "bv": Weight((N, H), ("vision_heads", "vision_head_dim"), zeros),
        "wo": Weight((N, H, W), ("vision_heads", "vision_head_dim", "vision_embed"), fan_in(W)),
        "bo": Weight((W,), ("vision_embed",), zeros),
        "norm2_scale": Weight((W,), ("vision_embed",), ones),
        "norm2_bias": Weight((W,), ("vision_embed",), zeros),
        "w1": Weight((W, M), ("vision_embed", "vision_mlp"), fan_in(W)),
        "b1": Weight((M,), ("vision_mlp",), zeros),
        "w2": Weight((M, W), ("vision_mlp", "vision_embed"), fan_in(M)),
        "b2": Weight((W,), ("vision_embed",), zeros),
    }
    return {
        "patch_embedding": Weight((pixels, W), ("patch", "vision_embed"), fan_in(pixels)),
        "patch_bias": Weight((W,), ("vision_embed",), zeros),
        "position_embedding": Weight((config.num_patches, W), ("patch", "vision_embed"), normal(W**-0.5)),
        "layers": stack(config.depth, layer),
        "post_norm_scale": Weight((W,), ("vision_embed",), ones),
        "post_norm_bias": Weight((W,), ("vision_embed",), zeros),
    }


class SiglipEncoder(nn.Module):
    """Frames to features of `feature_layer`, one frame independent of the next."""

    config: VisionConfig
    compute_dtype: str
    backend: AttentionBackend

    def setup(self) -> None:
        """Declares the parameters."""
        self.weights = declare(self, encoder_weights(self.config))

    def __call__(self, frames: UInt8[Array, "n r r 3"]) -> Float[Array, "n p w"]:
        """uint8[N, R, R, 3] frames to float[N, P, W] features in the compute dtype."""
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        weights = {name: value for name, value in self.weights.items() if name != "layers"}
        weights = cast(weights, dtype)
        pixels = (frames / 255.0 - jnp.array(config.image_mean)) / jnp.array(config.image_std)
        patches = patchify(pixels.astype(dtype), config.patch_size)
        x = patches @ weights["patch_embedding"] + weights["patch_bias"] + weights["position_embedding"]

        def body(x: Array, layer: dict[str, Array]) -> tuple[Array, None]:
            return encoder_layer(cast(layer, dtype), x, config=config, backend=self.backend), None

        x, _ = jax.lax.scan(body, x, self.weights["layers"])
        if config.post_layernorm:
            scale, bias = weights["post_norm_scale"], weights["post_norm_bias"]
            x = layer_norm(x, scale, bias, eps=config.layer_norm_eps)
        return x


def patchify(frames: Float[Array, "n r r 3"], patch: int) -> Float[Array, "n p d"]:
    """Square patches in row-major order, each flattened as (row, column, channel).

    Equals a VALID convolution with stride `patch`: pixels that fill no whole patch are left out.
    """
    count, grid = frames.shape[0], frames.shape[1] // patch
    frames = frames[:, : grid * patch, : grid * patch]
    frames = frames.reshape(count, grid, patch, grid, patch, 3)
    return jnp.einsum("nyaxbc->nyxabc", frames).reshape(count, grid * grid, patch * patch * 3)


def encoder_layer(
    weights: dict[str, Array],
    x: Float[Array, "n p w"],
    *,
    config: VisionConfig,
    backend: AttentionBackend,
) -> Float[Array, "n p w"]:
    """One pre-norm transformer layer; every patch of a frame reads every other."""
    w, eps = weights, config.layer_norm_eps
    y = layer_norm(x, w["norm1_scale"], w["norm1_bias"], eps=eps)
    q = jnp.einsum("npw,wah->npah", y, w["wq"]) + w["bq"]
    k = jnp.einsum("npw,wah->npah", y, w["wk"]) + w["bk"]
    v = jnp.einsum("npw,wah->npah", y, w["wv"]) + w["bv"]
    out = attention(q, k, v, backend=backend)
    x = x + jnp.einsum("npah,ahw->npw", out, w["wo"]) + w["bo"]
    y = layer_norm(x, w["norm2_scale"], w["norm2_bias"], eps=eps)
    y = jax.nn.gelu(y @ w["w1"] + w["b1"], approximate=True)
    return x + y @ w["w2"] + w["b2"]
