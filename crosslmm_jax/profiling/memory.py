"""Peak memory over the weights, by two witnesses: the compiler's plan and the allocator's high-water mark.

The mark covers the whole life of a process, so a reading belongs to a case only if it rises above what was
there before: programs are compiled before weights exist, and cases run from the smallest peak to the largest.
"""

from typing import Any

import jax


def planned(compiled: Any, *, inputs: int) -> dict[str, int] | None:
    """Bytes by the compiler's buffer assignment: what a call holds besides weights.

    `peak` is the sum of inputs, outputs and temporaries, which the run may stay below: an output may lie
    where a temporary was. None where the backend does not say.

    Args:
      compiled: the program.
      inputs: bytes of what it is called with besides weights (frames, tokens, caches).
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporaries = analysis.temp_size_in_bytes
    return {
        "inputs": inputs,
        "outputs": outputs,
        "temporaries": temporaries,
        "peak": inputs + outputs + temporaries,
    }


class HighWater:
    """The allocator's peak over a baseline, where the device keeps one (GPU, TPU)."""

    def __init__(self, device: Any = None) -> None:
        """Reads `device`, the first by default; nothing is counted as weights yet."""
        self._device = device or jax.devices()[0]
        self._weights = 0

    def weights_are_there(self) -> None:
        """All that is held now counts as weights."""
        self._weights = self._read("bytes_in_use") or 0

    def mark(self) -> int | None:
        """The highest use so far over the weights in bytes; None where the device does not say."""
        peak = self._read("peak_bytes_in_use")
        return None if peak is None else peak - self._weights

    def _read(self, name: str) -> int | None:
        stats = self._device.memory_stats()
        return None if stats is None else stats.get(name)


def peak_row(plan: dict[str, int] | None, before: int | None, after: int | None) -> dict[str, Any]:
    """The fields of a row about memory, in megabytes (10^6 bytes).

    Args:
      plan: of `planned`.
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
