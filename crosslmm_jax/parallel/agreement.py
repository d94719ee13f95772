"""What the processes of one program tell each other, and how they fail together.

Every process calls these functions at the same point, from the thread that also runs programs on the devices.
A single process communicates with nobody.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from crosslmm_jax.errors import FailedElsewhere, UserError

T = TypeVar("T")

_FEWEST_BYTES = 256  # of one process's share of what is gathered


def is_first_process() -> bool:
    """Whether this process writes files and prints for all of them."""
    return jax.process_index() == 0


class FailedSomewhere(Exception):
    """An action failed on at least one process; raised on all of them with every process's reason."""


def gather(value: object, *, room: int | None = None) -> list[Any]:
    """The JSON-serialisable `value` of every process, in order of their index.

    Args:
      value: of this process.
      room: bytes that suffice for every process's value as JSON, and the same on all. One collective
        operation is then enough; without it there are two.

    Raises:
      ValueError: the value takes more than `room`.
    """
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if room is None:
        sizes = multihost_utils.process_allgather(np.int32(encoded.size))
        # All processes gather arrays of one shape; each shape compiles a program, so there are few of them.
        room = max(_FEWEST_BYTES, 1 << int(sizes.max() - 1).bit_length())
    elif encoded.size > room:
        raise ValueError(f"a value of {encoded.size} bytes is gathered with room for {room}")
    padded = np.full(room, ord(" "), np.uint8)  # which JSON ignores
    padded[: encoded.size] = encoded
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


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
            raise FailedElsewhere(f"process {index} ended this run: {report['reason']}")
    if failed:
        single = len(reports) == 1
        reasons = [r["reason"] if single else f"process {index}: {r['reason']}" for index, r in failed]
        raise FailedSomewhere("; ".join(reasons)) from error
    return result  # type: ignore[return-value]


def together(action: Callable[[], T], *, same: Callable[[T], object] | None = None, what: str = "") -> T:
    """Runs `action` on every process and returns its result here, if it succeeded on all.

    A process that went on alone would wait for the others in the next program that they share.

    Args:
      action: must not wait for other processes.
      same: the JSON-serialisable part of the result in which all processes must agree.
      what: the name of that part, in the plural.

    Raises:
      UserError: the action has failed on a process with a UserError, or results differ.
      RuntimeError: it has failed on another process with another error.
      Exception: the error of this process.
    """
    if jax.process_count() == 1:
        return action()
    result, error = _result_or_error(action)
    agreed = same(result) if same is not None and error is None else None  # type: ignore[arg-type]
    users = error is None or isinstance(error, UserError)
    reason = None if error is None else _first_line(error)
    reports = gather({"users": users, "reason": reason, "agreed": agreed})
    failed = [f"process {index}: {r['reason']}" for index, r in enumerate(reports) if r["reason"] is not None]
    if not all(report["users"] for report in reports):
        raise error if error is not None and not users else RuntimeError("; ".join(failed))
    if error is not None:
        raise error
    if failed:
        raise FailedElsewhere("; ".join(failed))
    if differing := [index for index, r in enumerate(reports) if r["agreed"] != reports[0]["agreed"]]:
        raise UserError(
            f"{what} of process {differing[0]} are not those of process 0; give all the same files and"
            " options"
        )
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
