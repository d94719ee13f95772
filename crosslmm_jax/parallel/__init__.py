"""Devices: mesh, shardings, start of processes, compilation flags.

- `mesh`: the device mesh.
- `processes`: start and end of the processes of a run; `rank`: which of them this one is; `channel`: their
  connections.
- `agreement`: what processes tell each other, and how they fail together.
- `axis_rules`: the table of logical axes -> mesh axes.
- `sharding`: shardings of parameters and batches; the rows of each process.
- `compiler_options`: XLA options for programs of large matrix products.
- `xla_flags`: TPU flags in the environment.
- `compilation_cache`: compiled programs on disk.

The last two and `processes` are imported before jax, so all other names are imported late.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosslmm_jax.parallel import compilation_cache, processes, xla_flags
    from crosslmm_jax.parallel.agreement import (
        FailedSomewhere,
        gather,
        is_first_process,
        succeed_on_all,
        together,
    )
    from crosslmm_jax.parallel.axis_rules import activation_rules, partition_spec
    from crosslmm_jax.parallel.compiler_options import matmul_options, program
    from crosslmm_jax.parallel.mesh import abstract_mesh, make_mesh, mesh_sizes
    from crosslmm_jax.parallel.processes import initialize_processes
    from crosslmm_jax.parallel.sharding import (
        batch_shardings,
        check_batch_size,
        param_shardings,
        replicated,
        row_shard,
        to_global,
    )

__all__ = [
    "FailedSomewhere", "abstract_mesh", "activation_rules", "batch_shardings", "check_batch_size",
    "compilation_cache", "gather", "initialize_processes", "is_first_process", "make_mesh", "matmul_options",
    "mesh_sizes", "param_shardings", "partition_spec", "processes", "program", "replicated", "row_shard",
    "succeed_on_all", "to_global", "together", "xla_flags",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Imports the files of this package, which need jax, and returns what one of them defines."""
    # `from parallel import xla_flags` finds a file by itself.
    if name in __all__ and name not in ("compilation_cache", "processes", "xla_flags"):
        for file in ("mesh", "processes", "axis_rules", "sharding", "compiler_options", "agreement"):
            module = importlib.import_module(f"{__name__}.{file}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
