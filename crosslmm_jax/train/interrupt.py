"""SIGTERM and Ctrl-C: finish the step, save, then stop; and stop unsaved if that takes too long."""

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED = 130  # exit code, 128 + SIGINT, as shells use
SECOND_STOP_S = 5.0  # from a second Ctrl-C to the end


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; the same command resumes it."""


class StopRequest:
    """Within `with`, SIGTERM and the first Ctrl-C only set `signal_name`; a second Ctrl-C stops at once.

    The main thread may be unable to act: it waits for a device, or for a disk that hangs, and Python runs its
    signal handlers only between two instructions of that thread. So another thread hears of the signal, too,
    and ends the process when the block has not ended some seconds later.

    Does nothing outside the main thread, where Python cannot set handlers, and when it is not enabled: with
    several processes Orbax makes all of them stop after the same step.
    """

    def __init__(self, *, enabled: bool, deadline_s: float) -> None:
        """`enabled=False` changes no signal handler; `deadline_s`: from the signal to the end."""
        self.signal_name: str | None = None
        self._deadline_s = deadline_s
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._previous_handlers: dict[int, object] = {}
        self._ended = threading.Event()

    def __enter__(self) -> "StopRequest":
        if self._enabled:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            # Python writes a signal's number there at once, whatever the main thread does.
            self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
            threading.Thread(target=self._watch, name="stop-deadline", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._enabled:
            self._ended.set()
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._previous_writer)
            os.close(self._writer)  # ends the thread's wait

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt(
                "stopped without saving: the steps since the newest checkpoint are lost; the same command"
                " resumes from it"
            )
        self.signal_name = signal.Signals(number).name

    def _watch(self) -> None:
        """Reads the numbers of signals, and starts the deadline of each."""
        heard = 0
        while read := os.read(self._reader, 1):
            if read[0] in (signal.SIGTERM, signal.SIGINT):
                second = heard > 0 and read[0] == signal.SIGINT
                heard += 1
                seconds = SECOND_STOP_S if second else self._deadline_s
                threading.Thread(target=self._end_after, args=(seconds,), daemon=True).start()
        os.close(self._reader)

    def _end_after(self, seconds: float) -> None:
        if self._ended.wait(seconds):
            return
        message = (
            f"crosslmm: stopped {seconds:.0f} s after the signal without saving: the run did not end by"
            " itself; the same command resumes from the newest checkpoint\n"
        )
        # In a thread, since stderr may be what hangs.
        printing = threading.Thread(target=sys.stderr.write, args=(message,), daemon=True)
        printing.start()
        printing.join(1)
        os._exit(INTERRUPTED)
