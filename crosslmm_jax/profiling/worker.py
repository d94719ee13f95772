"""One measuring process: `python -m crosslmm_jax.profiling.worker RECORD.json REQUEST`.

Each system has a process of its own, so that its memory is really free before the next one starts.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from crosslmm_jax.profiling.record import Record, Request

# Variables that change how XLA compiles and how it takes memory.
FLAGS = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Measures what the request (JSON) says; the exit code is 1 if that ended with an error."""
    path, text = argv
    request = Request.from_json(text)
    record = Record(path, request)
    try:
        _measure(record)
    except Exception as error:  # reported to the parent, in the record
        record.add_error(request.task, error)
        return 1
    return 0


def _measure(record: Record) -> None:
    from crosslmm_jax.presets import PRESETS

    request = record.request
    if request.system not in PRESETS:
        importlib.import_module("perf.peers").run(record)
        return
    import jax

    from crosslmm_jax.profiling.timing import matmul_rate

    device = jax.devices()[0]
    rate = matmul_rate()
    record.add_facts(environment={name: os.environ[name] for name in FLAGS if os.environ.get(name)})
    record.add_facts(
        device=device.device_kind, platform=f"jax {device.platform}", matmul_tflops=rate["matmul_tflops"],
        matmul=rate,
    )  # fmt: skip
    importlib.import_module(f"crosslmm_jax.profiling.{request.task}").run(record)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
