"""Output that training can do without: it may fail or hang, and no step waits for it."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

MAX_WAITING_CALLS = 1000  # later calls are dropped


class Closable(Protocol):
    """What a side channel writes to."""

    def close(self) -> None:
        """Ends the output."""


Output = TypeVar("Output", bound=Closable)


class SideChannel(Generic[Output]):
    """An output with a thread of its own, in which it is made and called, in order.

    The first call that fails is warned of. Later ones are made all the same: a full disk may be cleared.
    """

    def __init__(self, name: str, make: Callable[[], Output], *, warns: bool = True) -> None:
        """Starts the thread.

        Args:
          name: of the output, in the warning.
          make: opens the output. It is called again before later calls if it fails.
          warns: False for an output to the place where warnings go.
        """
        self._name, self._make, self._warns = name, make, warns
        self._output: Output | None = None
        self._calls: queue.Queue[Callable[[Output], None] | None] = queue.Queue(MAX_WAITING_CALLS)
        self._idle = threading.Event()
        self._hangs = False
        self._thread = threading.Thread(target=self._work, name=f"write {name}", daemon=True)
        self._thread.start()

    def call(self, action: Callable[[Output], None]) -> None:
        """Lets the thread call `action` with the output. Returns at once and raises nothing."""
        try:
            self._calls.put_nowait(action)
        except queue.Full:
            self._warn(f"hangs; {MAX_WAITING_CALLS} calls wait for it, and what follows is dropped")

    def wait(self, seconds: float) -> None:
        """Returns when the calls so far are done, or after some seconds: at once while it still hangs."""
        done = threading.Event()
        if not self._within(0 if self._hangs else seconds, lambda _: done.set(), done.wait):
            self._hangs = True
            self._warn("hangs; training goes on without it")

    def close(self, seconds: float) -> None:
        """Closes the output after the calls so far, or leaves it behind after some seconds."""

        def ended(seconds: float) -> bool:
            self._thread.join(seconds)
            return not self._thread.is_alive()

        if not self._within(0 if self._hangs else seconds, None, ended):
            self._warn("hangs; it is not complete")

    def _within(
        self, seconds: float, call: Callable[[Output], None] | None, done: Callable[[float], bool]
    ) -> bool:
        """Lets the thread make `call`, and waits for it with `done`; False if that takes too long."""
        deadline = time.monotonic() + seconds
        try:
            self._calls.put(call, timeout=seconds)
        except queue.Full:
            return False
        return done(max(deadline - time.monotonic(), 0))

    def _work(self) -> None:
        while (action := self._calls.get()) is not None:
            self._run(action)
            self._hangs = False
        if self._output is not None:
            self._run(lambda output: output.close())

    def _run(self, action: Callable[[Output], None]) -> None:
        try:
            if self._output is None:
                self._output = self._make()
            action(self._output)
        except Exception as error:  # of whatever kind: nothing here may stop a run
            reason = (error.strerror if isinstance(error, OSError) else None) or repr(error)
            self._warn(f"cannot be written ({reason}); training goes on without it")

    def _warn(self, problem: str) -> None:
        if self._warns:
            self._warns = False
            logger.warning("%s %s", self._name, problem)
