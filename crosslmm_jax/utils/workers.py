"""Worker processes that never outlive the process they work for."""

import collections
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from crosslmm_jax.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_FUNCTION: Callable[[Any], Any] | None = None  # what this worker process calls with each task


def map_in_order(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    workers: int,
    spare: int = 1,
    if_one_dies: str,
) -> Iterator[Result]:
    """Yields `function(task)` for each of `tasks`, in their order.

    Args:
        function: called with one task; each worker process gets one copy of it, which it keeps.
        tasks: read as they are needed.
        workers: most worker processes; no more are started than there are tasks. With 0, or for a single
            task, this process does the work.
        spare: tasks beyond one per worker that are read before the oldest result is taken.
        if_one_dies: what a user should do when a worker process dies, for the message.

    Raises:
        UserError: a worker process died.
    """
    tasks = iter(tasks)
    first = list(itertools.islice(tasks, 2))
    tasks = itertools.chain(first, tasks)
    if not workers or len(first) < 2:
        yield from map(function, tasks)
        return
    # Such a pool starts a process only for a task that finds all others busy.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start, initargs=(function,)
    )
    waiting: collections.deque[Future[Result]] = collections.deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_call, task))
            if len(waiting) >= workers + spare:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(f"a worker process died, perhaps out of memory; {if_one_dies}") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _FUNCTION
    work_for_parent()
    _FUNCTION = function


def _call(task: Any) -> Any:
    assert _FUNCTION is not None
    return _FUNCTION(task)


def work_for_parent() -> None:
    """Makes this process end with its parent, and with nothing else. Does nothing in a process without one.

    Ctrl-C in a terminal reaches all processes; the parent ends its workers.
    """
    end_with_parent()
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_parent() -> None:
    """Makes this process end as soon as the process that started it is gone.

    A killed parent cannot stop its workers, which would otherwise wait for work for ever.
    """
    threading.Thread(target=_wait_for_parent, name="end-with-parent", daemon=True).start()


def kill_with_parent() -> None:
    """For `preexec_fn` of `subprocess`: has Linux kill the new process when its parent ends in any way.

    Else it would keep the device. `end_with_parent` is for processes of `multiprocessing`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
