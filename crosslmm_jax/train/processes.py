"""What the processes of a run tell each other outside of its steps; a single process asks nobody."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import flatten

T = TypeVar("T")

# Where a host finds its copies and how fast it reads them; the index itself is compared by its digest.
_OF_A_HOST = frozenset({
    "data.index", "data.tokenizer", "data.num_workers", "data.num_threads", "data.prefetch",
    "data.frame_cache_mb", "run.init_from",
})  # fmt: skip


class FailedSomewhere(Exception):
    """What some process could not do, and why; raised on all of them."""


def exchange(value: Any) -> list[Any]:
    """`value`, which JSON can hold, of every process in their order. All call this at the same point."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    padded = np.zeros(int(sizes.max()), np.uint8)  # what is gathered has one shape
    padded[: own.size] = own
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def together(act: Callable[[], T]) -> T:
    """What `act` returns on this process, once it succeeded on all; it must not wait for other processes.

    Raises:
      FailedSomewhere: it failed on some process in a way that another input may not.
      UserError: it failed on another process in a way that ends the run; that one raises its own error.
    """
    result, error = _tried(act)
    final = isinstance(error, (UserError, MemoryError)) or "RESOURCE_EXHAUSTED" in str(error)
    reports = exchange({"final": final, "reason": None if error is None else _first_line(error)})
    if error is not None and final:
        raise error
    failed = [(index, report) for index, report in enumerate(reports) if report["reason"] is not None]
    for index, report in failed:
        if report["final"]:
            raise UserError(f"process {index} ended this run: {report['reason']}")
    if failed:
        single = len(reports) == 1
        reasons = [r["reason"] if single else f"process {index}: {r['reason']}" for index, r in failed]
        raise FailedSomewhere("; ".join(reasons)) from error
    return result  # type: ignore[return-value]


def _tried(act: Callable[[], T]) -> tuple[T | None, Exception | None]:
    # A function of its own: where an exception is caught, its traceback keeps all variables alive.
    try:
        return act(), None
    except Exception as error:
        return None, error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def check_alike(settings: Sequence[Mapping[str, Any]]) -> None:
    """Raises a `ConfigError` naming all in which processes differ and that decides what the run computes.

    Args:
      settings: of each process, nested dicts as JSON holds them.
    """
    first, *others = (flatten(each) for each in settings)
    different = []
    for index, other in enumerate(others, start=1):
        names = sorted((first.keys() | other.keys()) - _OF_A_HOST)
        different += [
            f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process {index}"
            for name in names
            if first.get(name) != other.get(name)
        ]
    if different:
        raise ConfigError(
            f"the processes of this run differ: {'; '.join(different[:8])}; give all of them the same config,"
            " and at data.index copies of one index"
        )
