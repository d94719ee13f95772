"""SigLIP2 vision encoder: frames to patch features.

Reference implementation: Hugging Face's `SiglipVisionModel` (no class token, learned positions, pre-norm,
tanh-approximated GELU). The attention-pooling head is not part of it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt8

from crosslmm_jax.config import AttentionBackend, Precision, VisionConfig
from crosslmm_jax.model.attention.blockwise import RESIDUALS
from crosslmm_jax.model.attention.dispatch import attention, named_attention
from crosslmm_jax.model.ops import layer_norm, pad_tokens
from crosslmm_jax.model.params.partitioning import AxisRules, constrain, num_shards
from crosslmm_jax.model.params.tables import (
    Weight,
    WeightTable,
    cast,
    declare,
    fan_in,
    layer_of,
    normal,
    ones,
    stack,
    zeros,
)
from crosslmm_jax.model.quantisation.quantise import linear, operand, quantised_table

FP8_ROWS = 16  # the rows of an fp8 product on a GPU are a multiple of it
SAVED = "encoder_saved"  # checkpoint name of what remat="elementwise" saves for the backward pass


def encoder_weights(
    config: VisionConfig, matmul: Precision = "compute", *, stacked: bool = True
) -> WeightTable:
    """Parameters of the encoder, up to the layer whose output are the features.

    With `matmul` other than "compute", its layers are as `quantise_params` returns them.
    """
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
        "layers": stack(config.depth, quantised_table(layer, matmul, bounded=True), stacked=stacked),
        "post_norm_scale": Weight((W,), ("vision_embed",), ones),
        "post_norm_bias": Weight((W,), ("vision_embed",), zeros),
    }


class SiglipEncoder(nn.Module):
    """Frames to features of `feature_layer`; frames do not depend on each other.

    Attributes:
      config: sizes and choices.
      compute_dtype: dtype of activations and of cast weights.
      backend: attention backend.
      rules: logical axis -> mesh axes.
      matmul: precision of the matrices of the layers; patch embedding and attention scores stay in the
        compute dtype.
      stacked: the layers' weights are stacked on axis 0 and scanned; otherwise each layer has its own arrays,
        and the loop is unrolled.
    """

    config: VisionConfig
    compute_dtype: str
    backend: AttentionBackend
    rules: AxisRules | None = None
    matmul: Precision = "compute"
    stacked: bool = True

    def setup(self) -> None:
        """Declares the parameters."""
        self.weights = declare(self, encoder_weights(self.config, self.matmul, stacked=self.stacked))

    def __call__(self, frames: UInt8[Array, "n r r 3"]) -> Float[Array, "n p w"]:
        """uint8[n, R, R, 3], n frames (B*F), to float[n, P, W] features in the compute dtype."""
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        weights = {name: value for name, value in self.weights.items() if name != "layers"}
        weights = cast(weights, dtype)

        def embed(frames: Array) -> Array:
            pixels = (frames / 255.0 - jnp.array(config.image_mean)) / jnp.array(config.image_std)
            patches = patchify(pixels.astype(dtype), config.patch_size)
            x = patches @ weights["patch_embedding"] + weights["patch_bias"] + weights["position_embedding"]
            return constrain(x, self.rules, "act_frames", None, None)

        patches = config.num_patches

        def body(x: Array, layer: dict[str, Array]) -> tuple[Array, None]:
            layer = cast(layer, dtype)
            x = encoder_layer(
                layer, x, patches=patches, config=config, backend=self.backend, rules=self.rules
            )
            # Without this constraint the compiler may shard activations as the weights are, by width. It
            # would then move those of all frames several times per layer, instead of gathering the layer's
            # weights.
            return constrain(x, self.rules, "act_frames", None, None), None

        x, layers = _rematerialised(embed, config)(frames), _rematerialised(body, config)
        x = pad_tokens(x, self._padded_patches(frames.shape[0]))
        if self.stacked:
            x, _ = jax.lax.scan(layers, x, self.weights["layers"])
        else:
            layer = jax.jit(layers)  # traced and lowered once, as the decoder's layers (`each_layer`)
            for index in range(config.depth):
                x, _ = layer(x, layer_of(self.weights["layers"], index))
        x = x[:, :patches]
        if config.post_layernorm:
            scale, bias = weights["post_norm_scale"], weights["post_norm_bias"]
            x = layer_norm(x, scale, bias, eps=config.layer_norm_eps)
        return x

    def _padded_patches(self, frames: int) -> int:
        """Tokens per frame within the layers: on a GPU padded beyond the patches, once for all layers.

        - cuDNN's backward pass takes only even lengths. Padding there would be six passes per layer.
        - cuBLASLt's fp8 products take multiples of 16 rows. Otherwise XLA pads and slices around each product
          and leaves bias, GELU and residual outside.
        """
        patches = self.config.num_patches
        if jax.default_backend() != "gpu":
            return patches
        rows = frames // num_shards(self.rules, "act_frames") * patches  # on each device
        if self.matmul == "fp8" and rows % FP8_ROWS:
            return -(-patches // FP8_ROWS) * FP8_ROWS
        return patches + patches % 2 if self.stacked else patches


def _rematerialised(function: Callable, config: VisionConfig) -> Callable:
    """`function` with `config.remat`; within a chunk, "chunk" is the same as "layer"."""
    if config.remat == "none":
        return function
    # Outputs of matrix products and of the attention have names. All else takes a few passes over memory.
    save = jax.checkpoint_policies.save_only_these_names(SAVED, RESIDUALS)
    return jax.checkpoint(function, prevent_cse=False, policy=save if config.remat == "elementwise" else None)


def patchify(frames: Float[Array, "n r r 3"], patch: int) -> Float[Array, "n p d"]:
    """Square patches in row-major order, each flattened as (row, column, channel).

    Equals a VALID convolution with stride `patch`: pixels beyond the last whole patch are dropped.
    """
    count, grid = frames.shape[0], frames.shape[1] // patch
    frames = frames[:, : grid * patch, : grid * patch]
    frames = frames.reshape(count, grid, patch, grid, patch, 3)
    return jnp.einsum("nyaxbc->nyxabc", frames).reshape(count, grid * grid, patch * patch * 3)


def encoder_layer(
    weights: dict[str, Array],
    x: Float[Array, "n u w"],
    *,
    patches: int,
    config: VisionConfig,
    backend: AttentionBackend,
    rules: AxisRules | None = None,
) -> Float[Array, "n u w"]:
    """One pre-norm transformer layer over P patches and padding, U >= P. No patch reads padding."""
    w, eps = weights, config.layer_norm_eps
    shape, heads = x.shape, (*x.shape[:2], config.num_heads, config.head_dim)
    # Two-dimensional throughout: a reshape between GELU and the rounding to fp8 would be a pass over memory.
    x = x.reshape(-1, x.shape[-1])
    y = operand(layer_norm(x, w["norm1_scale"], w["norm1_bias"], eps=eps), w, "wq")
    q, k, v = (
        linear(y, w, matrix, bias).reshape(heads)
        for matrix, bias in (("wq", "bq"), ("wk", "bk"), ("wv", "bv"))
    )
    stop = None if shape[1] == patches else np.full((shape[0], 1), patches, np.int32)
    with named_attention("encoder"):
        out = attention(q, k, v, kv_stop=stop, backend=backend, rules=rules, axes=("act_frames", None))
    out = checkpoint_name(out, SAVED)
    x = checkpoint_name(x + linear(operand(out.reshape(x.shape), w, "wo"), w, "wo", "bo"), SAVED)
    y = operand(layer_norm(x, w["norm2_scale"], w["norm2_bias"], eps=eps), w, "w1")
    y = jax.nn.gelu(checkpoint_name(linear(y, w, "w1", "b1"), SAVED), approximate=True)
    return (x + linear(operand(y, w, "w2"), w, "w2", "b2")).reshape(shape)
