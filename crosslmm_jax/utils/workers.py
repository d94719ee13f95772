"""Worker processes that never outlive the process they work for."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def worker_pool(
    workers: int, start: Callable[..., None] | None = None, *arguments: object
) -> ProcessPoolExecutor:
    """`workers` fresh processes. Each of them first calls `start(*arguments)`."""
    return ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start,
        initargs=(start, arguments),
    )  # fmt: skip


def _start(start: Callable[..., None] | None, arguments: tuple[object, ...]) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    if start is not None:
        start(*arguments)


def end_with_parent() -> None:
    """Makes this process end as soon as the process that started it is gone.

    A killed parent cannot stop its workers, which would otherwise wait for work for ever.
    """
    threading.Thread(target=_wait_for_parent, name="end-with-parent", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
