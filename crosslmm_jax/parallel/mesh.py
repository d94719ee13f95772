"""The device mesh."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.errors import ConfigError

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "tensor", "context")
# Axes that may span several slices, first those whose collectives a slow network hurts least.
_OUTER_FIRST = ("data", "fsdp", "context", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of axes `data`, `fsdp`, `tensor`, `context` over all devices, or over `devices`.

    Axes are of type Auto: the compiler shards every array, by the constraints in the model.
    Enter the mesh with `jax.set_mesh`.

    Several slices of TPUs, or hosts with GPUs that no NVLink joins, are one mesh: `data` spans them if its
    size allows that, else `fsdp`, and so on.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or slices differ in theirs.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill(config, len(devices))
    kinds = (AxisType.Auto,) * len(sizes)
    if len({_slice_of(device) for device in devices}) > 1:  # which jax.make_mesh refuses
        return Mesh(_over_slices(devices, sizes), MESH_AXES, axis_types=kinds)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=kinds, devices=devices)


def _slice_of(device: object) -> int:
    return getattr(device, "slice_index", 0)


def _over_slices(devices: list, sizes: Sequence[int]) -> np.ndarray:
    """The devices of several slices in the shape `sizes`; outer axes span the slices."""
    counts = collections.Counter(_slice_of(device) for device in devices)
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"the {len(counts)} hosts or slices of this run have {sorted(counts.values())} devices; give each"
            " the same number"
        )
    inner, outer, slices = dict(zip(MESH_AXES, sizes, strict=True)), dict.fromkeys(MESH_AXES, 1), len(counts)
    for axis in _OUTER_FIRST:
        outer[axis] = math.gcd(slices, inner[axis])
        inner[axis] //= outer[axis]
        slices //= outer[axis]
    split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")  # as in jax.make_mesh
    return mesh_utils.create_hybrid_device_mesh(
        [inner[axis] for axis in MESH_AXES], [outer[axis] for axis in MESH_AXES], devices,
        allow_split_physical_axes=split,
    )  # fmt: skip


def _fill(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of the mesh axes, with -1 replaced by the number of remaining devices."""
    wanted = dataclasses.asdict(config)
    fixed = math.prod(size for size in wanted.values() if size != -1)
    remaining, rest = divmod(num_devices, fixed)
    fits = rest == 0 if -1 in wanted.values() else fixed == num_devices
    if not fits or remaining == 0:
        shown = " x ".join(f"{name}={size}" for name, size in wanted.items())
        raise ConfigError(
            f"MeshConfig {shown} does not fit {num_devices} device(s): they must multiply to {num_devices};"
            " one of them may be -1, for all remaining devices"
        )
    return tuple(remaining if wanted[name] == -1 else wanted[name] for name in MESH_AXES)
