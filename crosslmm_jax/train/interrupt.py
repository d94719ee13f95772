"""SIGTERM and Ctrl-C: finish the step, save, then stop."""

import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; the same command resumes it."""


class StopRequest:
    """Within `with`, SIGTERM and the first Ctrl-C only set `signal_name`; a second Ctrl-C stops at once.

    Does nothing outside the main thread, where Python cannot set handlers, and when it is not enabled: with
    several processes Orbax makes all of them stop after the same step.
    """

    def __init__(self, *, enabled: bool) -> None:
        """`enabled=False` changes no signal handler."""
        self.signal_name: str | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if self._enabled:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
