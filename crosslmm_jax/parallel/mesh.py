"""The device mesh."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.errors import ConfigError

MESH_AXES: tuple[str, ...] = ("data", "fsdp", "tensor", "context")
# Axes that may span several slices, first those whose collectives a slow network hurts least.
_OUTER_FIRST = ("data", "fsdp", "context", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None, *, rows: int | None = None) -> Mesh:
    """The mesh of axes `data`, `fsdp`, `tensor`, `context` over all devices, or over `devices`.

    Axes are of type Auto: the compiler shards every array, by the constraints in the model.
    Enter the mesh with `jax.set_mesh`.

    Args:
      config: sizes of the axes; `mesh_sizes` says what becomes of -1.
      devices: None for all.
      rows: of a global batch.

    Several slices of TPUs, or hosts with GPUs that no NVLink joins, are one mesh: `data` spans them if its
    size allows that, else `fsdp`, and so on.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or slices differ in theirs.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = {_slice_of(device) for device in devices}
    node = len(devices) // max(len(slices), 1)
    sizes = tuple(mesh_sizes(config, len(devices), rows=rows, node=node).values())
    kinds = (AxisType.Auto,) * len(sizes)
    if len(slices) > 1:  # which jax.make_mesh refuses
        return Mesh(_over_slices(devices, sizes), MESH_AXES, axis_types=kinds)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=kinds, devices=devices)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that are not there, for shapes and shardings; axes that `sizes` leaves out have 1."""
    wanted = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(wanted, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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


def mesh_sizes(
    config: MeshConfig, num_devices: int, *, rows: int | None = None, node: int | None = None
) -> dict[str, int]:
    """Devices along each of MESH_AXES.

    A single -1 stands for all devices that remain. Several are chosen together: `data` and `fsdp` take as
    many devices as divide the rows; `context` takes of the rest what divides a node, and `tensor` what is
    left. `fsdp` is what these leave of a node, or a whole node where they fill one; `data` goes over nodes.

    Args:
      config: wanted sizes.
      num_devices: in all.
      rows: of a global batch; None: any number of devices divides them.
      node: devices that a fast network joins (NVLink, or the ICI of a TPU slice); None: all.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or more devices than rows remain for
        `data` and `fsdp`.
    """
    sizes = dataclasses.asdict(config)
    chosen = [name for name in MESH_AXES if sizes[name] == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    remaining, rest = divmod(num_devices, fixed)
    if rest or not remaining or (remaining > 1 and not chosen):
        raise ConfigError(
            f"MeshConfig {_shown(sizes)} does not fit {num_devices} device(s): they must multiply to"
            f" {num_devices}; -1 stands for all remaining devices"
        )
    if len(chosen) == 1:
        sizes[chosen[0]] = remaining
        return {name: sizes[name] for name in MESH_AXES}
    node = node or num_devices
    along_rows = [name for name in ("data", "fsdp") if name in chosen]
    along_frames = [name for name in ("context", "tensor") if name in chosen]
    split = 1
    if along_rows:
        taken = math.prod(sizes[name] for name in ("data", "fsdp") if name not in chosen)
        split = remaining if rows is None else math.gcd(remaining, max(rows // taken, 1))
    if not along_frames and split < remaining:
        raise ConfigError(
            f"MeshConfig {_shown(sizes)}: {remaining} of {num_devices} devices would share {rows} rows, which"
            f" divide over {split}; set context to -1 too, or data.batch_size to a multiple of {num_devices}"
        )
    sizes |= _shared_out(remaining // split, along_frames, inner=("context", node))
    # Weights cross nodes only where frames fill a node.
    beside = node // math.gcd(node, sizes["context"] * sizes["tensor"])
    sizes |= _shared_out(split, along_rows, inner=("fsdp", beside if beside > 1 else node))
    return {name: sizes[name] for name in MESH_AXES}


def _shared_out(count: int, axes: Sequence[str], *, inner: tuple[str, int]) -> dict[str, int]:
    """Sizes of at most two axes that multiply to `count`; of two, `inner` takes what divides its number."""
    name, most = inner
    if len(axes) < 2:
        return dict.fromkeys(axes, count)
    size = math.gcd(count, most)
    return {axis: size if axis == name else count // size for axis in axes}


def _shown(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items())
