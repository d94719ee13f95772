"""From frames to the tokens that the decoder reads: encode, pool and project, chunk by chunk.

The encoder features of all frames never exist at once: only compact and original tokens of a chunk are kept.
`VisionConfig.remat` says what the backward pass recomputes. Memory that it takes, of SigLIP2 so400m in
bfloat16:

    remat        recomputed                                     per layer and frame   26 layers, 64 frames
    none         nothing                                            68 MB                  113 GB
    elementwise  norms and GELU, from products and attention        18 MB                   30 GB
    layer        each layer, from its input                        1.7 MB                  2.8 GB
    chunk        a chunk from its pixels, then each layer          1.7 MB, one chunk's     1.4 GB
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from crosslmm_jax.batch import RowOrNone
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.params.partitioning import AxisRules, constrain, num_shards

FEATURES = "vision_features"
# Sizes to choose from with `frame_chunk=None`. On one H100, 64 frames at once were no faster than 32.
CHUNKS = (32, 16, 8, 4, 2, 1)
CPU_CHUNK = 8  # and of any backend that does not say how much memory it has
CHUNK_SHARE = 1 / 8  # of the memory beside the weights: what the activations of a chunk may take


class Visual(NamedTuple):
    """A video as the decoder reads it."""

    compact: Float[Array, "b n d"]  # F*C tokens, pooled and projected, in frame order
    originals: Float[Array, "b f p d"]  # the input of K/V, at unit root mean square


class Appended(NamedTuple):
    """n frames that come right after a KV cache, for rows with as many frames in their cache."""

    originals: Float[Array, "b f p d"]  # of all frames, those in the cache first; F = room
    visible_frames: RowOrNone[Array]  # int32[B, n*C], of the new compact tokens; 0 for padded frames
    first: Int[Array, ""]  # number of frames in the cache


def frame_chunk(config: ModelConfig, memory: int | None = None) -> int:
    """Frames that a device encodes at once: the configured number, or one that fits its memory.

    It depends on sizes and on the memory that the process may use in all, not on what is free now. So all
    processes of a run with equal devices choose the same number at any time.

    Args:
      config: the model configuration.
      memory: bytes of a device; None: those that this process may use of its first one.
    """
    if config.vision.frame_chunk is not None:
        return config.vision.frame_chunk
    memory = memory or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if memory is None:
        return CPU_CHUNK
    frames = CHUNK_SHARE * (memory - _weight_bytes(config)) / encoder_frame_bytes(config)
    return next((size for size in CHUNKS if size <= frames), 1)


def _weight_bytes(config: ModelConfig) -> int:
    """Bytes of all matrices of the model at inference."""
    v, d = config.vision, config.decoder
    encoder = v.depth * (4 * v.width**2 + 2 * v.width * v.mlp_width)
    attention = 2 * d.width * d.head_dim * (d.num_heads + d.num_kv_heads)
    decoder = d.num_layers * (attention + 3 * d.width * d.mlp_width)
    cross = 2 * len(config.cross_attention_layers) * attention
    embeddings = d.vocab_size * d.width * (1 if d.tie_embeddings else 2)
    return (encoder + decoder + cross + embeddings) * jnp.dtype(config.compute_dtype).itemsize


def encoder_frame_bytes(config: ModelConfig) -> int:
    """Bytes of the activations of one frame in a layer: input, residual, norm, Q, K, V and hidden units."""
    v = config.vision
    return v.num_patches * (6 * v.width + 2 * v.mlp_width) * jnp.dtype(config.compute_dtype).itemsize


def encode_in_chunks(
    frames: UInt8[Array, "b f r r 3"],
    *,
    encode: Callable[[Array], Array],
    pool: Callable[[Array], tuple[Array, Array]],
    config: ModelConfig,
    rules: AxisRules | None,
) -> Visual:
    """uint8[B, F, R, R, 3] to compact tokens and original tokens.

    Args:
      frames: pixels.
      encode: the encoder, uint8[n, R, R, 3] -> float[n, P, W], n frames (B*F in chunks).
      pool: float[n, P, W] -> float[n, C, D] compact tokens and float[n, P, D] original tokens, the pooler.
      config: the model configuration.
      rules: logical axis -> mesh axes; the frames of a chunk are sharded over all devices.
    """
    batch, length = frames.shape[:2]
    shards = num_shards(rules, "act_frames")
    count = max(1, -(-batch * length // (frame_chunk(config) * shards)))
    size = -(-batch * length // (count * shards)) * shards
    flat = frames.reshape(batch * length, *frames.shape[2:])
    flat = jnp.pad(flat, ((0, count * size - batch * length),) + ((0, 0),) * (flat.ndim - 1))

    def one_chunk(frames: Array) -> tuple[Array, Array]:
        frames = constrain(frames, rules, "act_frames", None, None, None)
        with jax.named_scope("encoder"):
            features = checkpoint_name(encode(frames), FEATURES)
        return pool(features)

    policy = jax.checkpoint_policies.save_only_these_names(FEATURES) if config.vision.keep_features else None
    recomputed = config.vision.remat == "chunk" or config.vision.keep_features
    chunk = jax.checkpoint(one_chunk, prevent_cse=False, policy=policy) if recomputed else one_chunk
    if count == 1:
        compact, originals = (x[None] for x in chunk(flat))
    else:
        # With several devices, a chunk takes some frames of each device, so that no frame changes devices.
        chunks = flat.reshape(size, count, *flat.shape[1:]) if shards > 1 else None
        chunks = flat.reshape(count, size, *flat.shape[1:]) if chunks is None else jnp.swapaxes(chunks, 0, 1)
        compact, originals = jax.lax.map(chunk, chunks)
        if shards > 1:
            compact, originals = jnp.swapaxes(compact, 0, 1), jnp.swapaxes(originals, 0, 1)

    def unflatten(x: Array) -> Array:
        return x.reshape(count * size, *x.shape[2:])[: batch * length].reshape(batch, length, *x.shape[2:])

    compact, originals = unflatten(compact), unflatten(originals)
    originals = constrain(originals, rules, "act_batch", "act_context", None, None)
    return Visual(compact.reshape(batch, -1, compact.shape[-1]), originals)
