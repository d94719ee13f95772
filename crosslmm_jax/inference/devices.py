"""The device mesh of answering."""

import math

import jax
from jax.sharding import Mesh

from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.model import param_shapes
from crosslmm_jax.parallel import make_mesh

WEIGHT_SHARE = 0.7  # of a device's memory that weights may take; the rest is for videos and answers


def answering_mesh(config: ModelConfig) -> Mesh:
    """All devices: videos divided among them where each can hold the weights, else weights sharded.

    The fewest devices that hold the weights together share them (`tensor`); groups of so many divide the
    videos (`data`). Devices that do not say how much memory they have count as large enough.
    """
    count, limit = jax.device_count(), (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    tensor = 1
    if limit is not None:
        shares = (share for share in range(1, count + 1) if count % share == 0)
        needed = _weight_bytes(config)
        tensor = next((share for share in shares if needed / share <= WEIGHT_SHARE * limit), count)
    return make_mesh(MeshConfig(data=-1, tensor=tensor))


def _weight_bytes(config: ModelConfig) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(param_shapes(config)))
