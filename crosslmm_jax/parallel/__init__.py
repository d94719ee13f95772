"""Devices: the mesh, the table from logical axes to mesh axes, shardings, and the start of processes."""

from crosslmm_jax.parallel.mesh import initialize_processes, make_mesh
from crosslmm_jax.parallel.rules import activation_rules, partition_spec
from crosslmm_jax.parallel.sharding import (
    batch_shardings,
    param_shardings,
    replicated,
    row_shard,
    to_global,
)

__all__ = [
    "activation_rules",
    "batch_shardings",
    "initialize_processes",
    "make_mesh",
    "param_shardings",
    "partition_spec",
    "replicated",
    "row_shard",
    "to_global",
]
