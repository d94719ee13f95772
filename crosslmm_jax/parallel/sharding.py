"""Shardings of parameters and batches, and the rows of a batch that each process reads."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from crosslmm_jax.batch import Batch, batch_axes
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.parallel.axis_rules import RULES, MeshAxes, partition_spec


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(
    axes: PyTree, shapes: PyTree, mesh: Mesh | AbstractMesh, *, rules: Mapping[str, MeshAxes] = RULES
) -> PyTree:
    """One `NamedSharding` per parameter.

    Args:
      axes: tree of tuples of logical axis names (`model.logical_axes`).
      shapes: the same tree of arrays or `jax.ShapeDtypeStruct` (`jax.eval_shape` of `init_params`).
      mesh: the device mesh.
      rules: logical axis -> mesh axes.

    Raises:
      KeyError, ValueError: as `partition_spec`, with the parameter's path.
    """

    def sharding(
        path: jax.tree_util.KeyPath, leaf_axes: tuple[str | None, ...], leaf: jax.Array | jax.ShapeDtypeStruct
    ) -> NamedSharding:
        try:
            spec = partition_spec(leaf_axes, leaf.shape, mesh.shape, rules=rules)
        except (KeyError, ValueError) as error:
            raise type(error)(f"parameter {jax.tree_util.keystr(path)}: {error.args[0]}") from error
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        sharding, axes, shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch[NamedSharding]:
    """One `NamedSharding` per array of a global batch, or of its shapes, by `batch.BATCH_AXES`."""

    def sharding(array: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(axes, array.shape, mesh.shape))

    return jax.tree.map(sharding, batch, batch_axes(batch))


def row_shard(mesh: Mesh) -> tuple[int, int]:
    """Which rows of a global batch this process reads: share `index` of `count` equal, contiguous shares.

    Processes that differ only along `tensor` or `context` read the same rows.

    Raises:
      ConfigError: the devices of a process do not form one share of rows.
    """
    rows = int(mesh.shape["data"] * mesh.shape["fsdp"])
    # With one row per device along (data, fsdp), the rows of a process are those of its devices.
    order = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))).devices_indices_map((rows,))
    held: dict[int, set[int]] = {}
    for device, index in order.items():
        held.setdefault(device.process_index, set()).update(range(rows)[index[0]])
    shares = sorted({tuple(sorted(share)) for share in held.values()})
    if sorted(row for share in shares for row in share) != list(range(rows)):
        raise ConfigError(
            "MeshConfig: processes hold overlapping rows of a batch; make data x fsdp a multiple of"
            " the number of processes, or tensor x context a multiple of the devices per process"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def check_batch_size(batch_size: int, mesh: Mesh | AbstractMesh, *, microbatches: int = 1) -> None:
    """Raises a `ConfigError` unless each microbatch can be sharded evenly over `data` and `fsdp`."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (devices * microbatches):
        raise ConfigError(
            f"DataConfig.batch_size is {batch_size}; it must be a multiple of data x fsdp = {devices} devices"
            f" times StageConfig.microbatches = {microbatches}, that is of {devices * microbatches}"
        )


def to_global(batch: Batch[np.ndarray], mesh: Mesh, *, num_shards: int = 1) -> Batch[jax.Array]:
    """The global batch on the devices, from the rows that this process read.

    Args:
      batch: this process's rows, `1 / num_shards` of the batch.
      mesh: devices to lay it on.
      num_shards: the count that `row_shard` returned.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] * num_shards, *x.shape[1:]), x.dtype), batch
    )
    shardings = batch_shardings(shapes, mesh)
    if jax.process_count() == 1:  # several times faster, which small models notice
        return jax.device_put(batch, shardings)
    return jax.tree.map(
        lambda rows, sharding, whole: jax.make_array_from_process_local_data(sharding, rows, whole.shape),
        batch, shardings, shapes,
    )  # fmt: skip
