"""SIGTERM and Ctrl-C: finish the step, save, then stop; and stop unsaved if that takes too long."""

import os
import signal
import threading
from types import FrameType

from crosslmm_jax.errors import INTERRUPTED, STALLED
from crosslmm_jax.parallel import processes

SECOND_STOP_S = 5.0  # from a second Ctrl-C to the end


class StopRequest:
    """Within `with`, `requested` says when to save and stop.

    - Before the first step nothing is lost: the process ends at once. The loop sets `nothing_to_save`.
    - Later SIGTERM and the first Ctrl-C make `requested` true. With several processes a signal to one is
      enough, and all of them stop after the same step: jax's handler of SIGTERM sees to that.
    - A second Ctrl-C stops at once.
    - The main thread may be unable to act: it waits for a device, or for a disk that hangs, and Python runs
      its signal handlers only between two instructions of that thread. So another thread hears of the signal,
      too, and ends the process when the block has not ended `deadline_s` seconds later.

    Does nothing in a single process outside the main thread, where Python cannot set handlers.
    """

    def __init__(self, *, deadline_s: float) -> None:
        """`deadline_s`: seconds from the signal to the end."""
        self.nothing_to_save = True
        self._signal_name: str | None = None
        self._deadline_s = deadline_s
        self._several = processes.several()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._previous_handlers: dict[int, object] = {}
        self._noticed, self._ended = threading.Event(), threading.Event()

    def heard(self) -> bool:
        """Whether this process knows of a request to stop; others may not know of it yet."""
        return self._signal_name is not None or self._noticed.is_set()

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`. All processes call this after every step, and agree."""
        if not self._several:
            return self._signal_name is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def __enter__(self) -> "StopRequest":
        numbers = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]
        if self._in_main_thread:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            # Python writes a signal's number there at once, whatever the main thread does.
            self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            for number in numbers:
                self._previous_handlers[number] = signal.signal(number, self._on_signal)
            threading.Thread(target=self._watch, name="stop-deadline", daemon=True).start()
        if self._several:
            threading.Thread(target=self._wait_for_notice, name="stop-notice", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._in_main_thread:
            for number, handler in self._previous_handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._previous_writer)
            os.close(self._writer)  # ends the thread's wait

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self._signal_name = self._signal_name is not None, signal.Signals(number).name
        if number == signal.SIGINT and self.nothing_to_save:
            raise KeyboardInterrupt("stopped before the first step; the same command goes on")
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt(
                "stopped without saving: the steps since the newest checkpoint are lost; the same command"
                " resumes from it"
            )
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)  # to jax's handler

    def _watch(self) -> None:
        """Reads the numbers of signals, and starts the deadline of each."""
        heard = 0
        while read := os.read(self._reader, 1):
            if read[0] in self._previous_handlers:
                second = heard > 0 and read[0] == signal.SIGINT
                heard += 1
                self._start_deadline(INTERRUPTED if second else read[0])
        os.close(self._reader)

    def _wait_for_notice(self) -> None:
        while not self._ended.is_set():
            if processes.wait_for_preemption_notice(seconds=3600):
                self._noticed.set()
                self._start_deadline(signal.SIGTERM)
                return

    def _start_deadline(self, number: int) -> None:
        seconds = SECOND_STOP_S if number == INTERRUPTED else self._deadline_s
        if number == signal.SIGTERM and self.nothing_to_save:
            seconds = 0
        threading.Thread(target=self._end_after, args=(seconds, number), daemon=True).start()

    def _end_after(self, seconds: float, number: int) -> None:
        if self._ended.wait(seconds):
            return
        if number == signal.SIGTERM and self.nothing_to_save:
            processes.leave(INTERRUPTED, "stopped before the first step; the same command goes on")
        processes.leave(
            INTERRUPTED if number == INTERRUPTED else STALLED,
            f"stopped {seconds:.0f} s after the signal without saving: the run did not end by itself; the"
            " same command resumes from the newest checkpoint",
        )
