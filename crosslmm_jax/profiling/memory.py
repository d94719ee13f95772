"""Peak memory over the weights, from two sources: the compiler's plan and the allocator's high-water mark.

The mark covers the whole life of a process, so it belongs to a case only if it rises while the case runs.
Hence programs are compiled before weights exist, and cases run from the smallest peak to the largest.
"""

from typing import Protocol

import jax
from jax.stages import Compiled

from crosslmm_jax.profiling.record import Row


def planned(compiled: Compiled, *, inputs: int) -> dict[str, int] | None:
    """Bytes that a call holds besides the weights, by the compiler's buffer assignment.

    `peak` is the sum of inputs, outputs and temporaries. A run may stay below it, since an output may take
    the place of a temporary. None if the backend does not report them.

    Args:
      compiled: the program.
      inputs: bytes of its arguments besides the weights (frames, tokens, caches).
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporaries = analysis.temp_size_in_bytes
    peak = inputs + outputs + temporaries
    return {"inputs": inputs, "outputs": outputs, "temporaries": temporaries, "peak": peak}


class Device(Protocol):
    """What is read of a `jax.Device`."""

    def memory_stats(self) -> dict[str, int] | None:
        """The allocator's counters in bytes, where it keeps any."""
        ...


class HighWater:
    """The allocator's peak over a baseline, where the device reports one (GPU, TPU)."""

    def __init__(self, device: Device | None = None) -> None:
        """Reads `device`, the first by default. Nothing is counted as weights yet."""
        self._device = device or jax.devices()[0]
        self._weights = 0

    def weights_are_there(self) -> None:
        """Counts everything that is held now as weights."""
        self._weights = self._read("bytes_in_use") or 0

    def mark(self) -> int | None:
        """The highest use so far over the weights, in bytes; None if the device does not report it."""
        peak = self._read("peak_bytes_in_use")
        return None if peak is None else peak - self._weights

    def _read(self, name: str) -> int | None:
        stats = self._device.memory_stats()
        return None if stats is None else stats.get(name)


def peak_row(plan: dict[str, int] | None, before: int | None, after: int | None) -> Row:
    """The fields of a row about memory, in megabytes (10^6 bytes).

    Args:
      plan: the result of `planned`.
      before: `HighWater.mark()` before the case ran.
      after: the same afterwards.
    """
    rose = before is not None and after is not None and after > before
    allocator = _megabytes(after) if rose and after is not None else None
    compiler = None if plan is None else _megabytes(plan["peak"])
    return {
        "peak_mb": compiler if allocator is None else allocator,
        "peak_from": "compiler" if allocator is None else "allocator",
        "peak_mb_allocator": allocator,
        "peak_mb_compiler": compiler,
        "memory_mb": None if plan is None else {name: _megabytes(size) for name, size in plan.items()},
    }


def _megabytes(size: int) -> float:
    return round(size / 1e6, 3)
