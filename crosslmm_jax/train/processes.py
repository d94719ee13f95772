"""What the processes of a run tell each other outside of its steps.

Every process calls these functions at the same point. A single process communicates with nobody.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import flatten

T = TypeVar("T")

# Where a host finds its copies and how fast it reads them; the index itself is compared by its digest. These
# are not the fields of role `Host`: `run.out` and the like must agree: all processes save and log at the same
# steps. Checkpoints hold the settings of process 0, and a resume compares them with those of process 0.
_OF_A_HOST = frozenset({
    "data.index", "data.tokenizer", "data.num_workers", "data.num_threads", "data.prefetch",
    "data.frame_cache_mb", "run.init_from",
})  # fmt: skip


class FailedSomewhere(Exception):
    """An action failed on at least one process; raised on all of them with every process's reason."""


def gather(value: object) -> list[Any]:
    """The JSON-serialisable `value` of every process, in order of their index."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(encoded.size))
    padded = np.zeros(int(sizes.max()), np.uint8)  # all processes gather arrays of one shape
    padded[: encoded.size] = encoded
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def succeed_on_all(action: Callable[[], T]) -> T:
    """Runs `action` on every process and returns its result here, if it succeeded on all.

    Args:
      action: must not wait for other processes. A UserError, or running out of memory, ends the run; after
        any other error the run may try something else.

    Raises:
      FailedSomewhere: it failed on a process, and the run may try something else.
      UserError: it failed on another process in a way that ends the run.
      Exception: the error of this process, if it ends the run.
    """
    result, error = _result_or_error(action)
    fatal = isinstance(error, (UserError, MemoryError)) or "RESOURCE_EXHAUSTED" in str(error)
    reports = gather({"fatal": fatal, "reason": None if error is None else _first_line(error)})
    if error is not None and fatal:
        raise error
    failed = [(index, report) for index, report in enumerate(reports) if report["reason"] is not None]
    for index, report in failed:
        if report["fatal"]:
            raise UserError(f"process {index} ended this run: {report['reason']}")
    if failed:
        single = len(reports) == 1
        reasons = [r["reason"] if single else f"process {index}: {r['reason']}" for index, r in failed]
        raise FailedSomewhere("; ".join(reasons)) from error
    return result  # type: ignore[return-value]


def _result_or_error(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    # A separate function: the traceback of a caught exception keeps all local variables alive.
    try:
        return action(), None
    except Exception as error:
        return None, error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def check_same_settings(settings: Sequence[Mapping[str, object]]) -> None:
    """Checks that all processes have the same settings, except for those that may differ between hosts.

    Args:
      settings: of each process, nested dicts of JSON values.

    Raises:
      ConfigError: settings that decide what the run computes differ; the message lists the first eight.
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
