"""Devices: the mesh, logical axis -> mesh axes, shardings, process start, and compilation flags.

Names are imported when they are first asked for: `xla_flags` has to be importable before jax is.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crosslmm_jax.parallel.axis_rules import activation_rules, partition_spec
    from crosslmm_jax.parallel.compiler_options import matmul_options, program
    from crosslmm_jax.parallel.mesh import initialize_processes, make_mesh
    from crosslmm_jax.parallel.sharding import (
        batch_shardings,
        check_batch_size,
        param_shardings,
        replicated,
        row_shard,
        to_global,
    )

__all__ = [
    "activation_rules",
    "batch_shardings",
    "check_batch_size",
    "initialize_processes",
    "make_mesh",
    "matmul_options",
    "param_shardings",
    "partition_spec",
    "program",
    "replicated",
    "row_shard",
    "to_global",
]

_MODULES = {
    "activation_rules": "axis_rules",
    "partition_spec": "axis_rules",
    "initialize_processes": "mesh",
    "make_mesh": "mesh",
    "matmul_options": "compiler_options",
    "program": "compiler_options",
}


def __getattr__(name: str) -> Any:
    """Imports the module that holds `name`."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'sharding')}")
    return getattr(module, name)
