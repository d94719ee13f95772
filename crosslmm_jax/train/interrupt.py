"""SIGTERM and Ctrl-C: finish the step, save, then stop."""

import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; the same command goes on from there."""


class StopRequest:
    """Within `with`, SIGTERM and the first Ctrl-C only set `signal_name`; a second Ctrl-C acts at once.

    Does nothing where handlers cannot be set: outside the main thread, and with several processes, where
    Orbax makes all of them stop at the same step.
    """

    def __init__(self, *, enabled: bool) -> None:
        """`enabled=False` leaves all signals alone."""
        self.signal_name: str | None = None
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if self._enabled:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
