"""From frames to what the decoder reads: encode, pool and project, chunk by chunk.

Features of all frames never exist at once: a chunk leaves its compact tokens and its original tokens, and
is recomputed in the backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt8

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.merge import pool
from crosslmm_jax.model.ops import rms_normalise
from crosslmm_jax.model.partitioning import AxisRules, constrain, num_shards

FEATURES = "vision_features"


class Visual(NamedTuple):
    """A video as the decoder reads it."""

    compact: Float[Array, "b n d"]  # F*C projected pooled tokens, in frame order
    originals: Float[Array, "b f p d"]  # what K/V are made from, at unit root mean square


def encode_in_chunks(
    frames: UInt8[Array, "b f r r 3"],
    *,
    encode: Callable[[Array], Array],
    project: Callable[[Array], Array],
    config: ModelConfig,
    rules: AxisRules | None,
) -> Visual:
    """uint8[B, F, R, R, 3] to compact tokens and original tokens.

    Args:
      frames: pixels.
      encode: uint8[n, R, R, 3] -> float[n, P, W].
      project: float[..., W] -> float[..., D].
      config: the whole model's.
      rules: logical axes; the frames of a chunk are spread over all devices.
    """
    batch, length = frames.shape[:2]
    shards = num_shards(rules, "act_frames")
    count = max(1, -(-batch * length // (config.vision.frame_chunk * shards)))
    size = -(-batch * length // (count * shards)) * shards
    flat = frames.reshape(batch * length, *frames.shape[2:])
    flat = jnp.pad(flat, ((0, count * size - batch * length),) + ((0, 0),) * (flat.ndim - 1))

    def one_chunk(frames: Array) -> tuple[Array, Array]:
        frames = constrain(frames, rules, "act_frames", None, None, None)
        with jax.named_scope("encoder"):
            features = checkpoint_name(encode(frames), FEATURES)
        with jax.named_scope("pool"):
            pooled = pool(features, config.merge.grid, config.merge.pooling)
        projected = config.cross_attention.kv_source == "projected"
        with jax.named_scope("projector"):
            compact = project(pooled)
            originals = project(features) if projected else features
            originals = rms_normalise(originals, config.decoder.rms_norm_eps)
        return compact, originals

    policy = jax.checkpoint_policies.save_only_these_names(FEATURES) if config.vision.keep_features else None
    chunk = jax.checkpoint(one_chunk, prevent_cse=False, policy=policy)
    if count == 1:
        compact, originals = (x[None] for x in chunk(flat))
    else:
        # With several devices a chunk takes a part of each device's frames, so that frames stay put.
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
