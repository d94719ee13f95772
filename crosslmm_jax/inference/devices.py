"""The device mesh of answering, and how much fits its devices."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.inference.prepare import prepared_shapes
from crosslmm_jax.inference.shapes import PromptShape
from crosslmm_jax.model import DTYPES
from crosslmm_jax.parallel import gather, make_mesh

WEIGHT_SHARE = 0.7  # of a device's memory that weights may take; the rest is for videos and answers
CACHE_SHARE = 0.25  # of the memory beside the weights: what the caches of a batch of videos may take
MOST_VIDEOS = 4  # of a batch, for each group of devices: more make generating hardly cheaper


def answering_mesh(config: ModelConfig, sizes: MeshConfig | None = None) -> Mesh:
    """All devices of all processes: videos divided among them where each can hold the weights, else weights
    sharded.

    The fewest devices that hold the weights together share them (`tensor`); groups of so many divide the
    videos (`data`). Devices that do not say how much memory they have count as large enough.

    Args:
        config: of the model.
        sizes: of the mesh axes, in place of this choice.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    if sizes is not None:
        return make_mesh(sizes)
    count, limit, tensor = jax.device_count(), _memory_limit(), 1
    if limit is not None and count > 1:
        needed = _weight_bytes(config)
        shares = (share for share in range(1, count + 1) if count % share == 0)
        tensor = next((share for share in shares if needed / share <= WEIGHT_SHARE * limit), count)
    return make_mesh(MeshConfig(data=-1, tensor=tensor))


def videos_at_once(config: ModelConfig, mesh: Mesh, shape: PromptShape) -> int:
    """Videos of `shape` whose questions are answered together: as many per group of devices as fit.

    Devices that do not say how much memory they have take one each.
    """
    limit, sizes = _memory_limit(), mesh.shape
    groups, shares = int(sizes["data"] * sizes["fsdp"]), int(sizes["tensor"])
    if limit is None:
        return groups
    decoder, cross = config.decoder, config.cross_attention
    per_token = 2 * decoder.num_kv_heads * decoder.head_dim
    stored = DTYPES.get(cross.cache_dtype, jnp.dtype(config.compute_dtype)).itemsize
    of_video = shape.cache_frames * config.vision.num_patches * len(config.cross_attention_layers) * stored
    of_text = shape.cache_tokens * decoder.num_layers * jnp.dtype(config.compute_dtype).itemsize
    room = CACHE_SHARE * (limit - _weight_bytes(config) / (shares * sizes["fsdp"]))
    return groups * max(1, min(MOST_VIDEOS, int(room // (per_token * (of_video + of_text) / shares))))


def _memory_limit() -> int | None:
    """Bytes that a process may use on a device, of the one with the fewest; None where one does not say."""
    here = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    limits = gather(here)  # all processes must choose the same
    return None if None in limits else min(limits)


def _weight_bytes(config: ModelConfig) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(prepared_shapes(config)))
