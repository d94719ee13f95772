"""Ends a run that waits in vain: the stacks of all threads go to RUN/stacks/, one line says who is missing.

The main thread marks its phases (`Watchdog.phase`); a thread compares how long they last with the bounds of
`config.WatchdogConfig`. A step that waits for another process is ended by the first process whose bound is
over, and the line names the processes that are behind.
"""

import contextlib
import dataclasses
import faulthandler
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from crosslmm_jax.config import WatchdogConfig
from crosslmm_jax.errors import STALLED
from crosslmm_jax.parallel import processes

STACKS = "stacks"  # folder within the run folder
_TICK_S = 0.5
_REARM_S = 10.0
_STDERR = 2


@dataclasses.dataclass
class _Phase:
    name: str
    step: int
    seconds: float = 0.0  # that this process has spent in it; less while the process is stopped


class Watchdog:
    """A context manager. Within it, a phase that outlasts its bound ends the process, and all others."""

    def __init__(self, limits: WatchdogConfig, out: Path) -> None:
        """Touches nothing yet. `out` is the run folder."""
        self._limits, self._out = limits, out
        self._phase = _Phase("restore", 0)
        self._ended = threading.Event()
        # A call into C that holds the interpreter stops this thread, too: then one of C ends the process.
        bounds = dataclasses.asdict(limits).values()
        self._last_resort_s = max(bounds) + 60 if all(bounds) else None

    def __enter__(self) -> "Watchdog":
        self._undo = processes.on_early_end(self._write_stacks)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._undo()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Marks what the main thread does inside."""
        outer = self._phase
        self.enter(name, outer.step)
        try:
            yield
        finally:
            self.enter(outer.name, outer.step)

    def enter(self, name: str, step: int) -> None:
        """Marks what the main thread does from now on; bounded by `{name}_s`, or like a step."""
        self._phase = _Phase(name, step)
        processes.set_place(step, name)

    def _watch(self) -> None:
        looked, armed = time.monotonic(), 0.0
        while not self._ended.wait(_TICK_S):
            now, phase = time.monotonic(), self._phase
            phase.seconds += min(now - looked, 2 * _TICK_S)  # not the time for which the process was stopped
            looked = now
            field = f"{phase.name}_s" if hasattr(self._limits, f"{phase.name}_s") else "step_s"
            bound = getattr(self._limits, field)
            if bound and phase.seconds > bound:
                self._end(phase, field)
            if self._last_resort_s and now - armed > _REARM_S:
                armed = now
                faulthandler.dump_traceback_later(self._last_resort_s, exit=True, file=_STDERR)
        if armed:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, phase: _Phase, field: str) -> None:
        at = f" of step {phase.step}" if phase.step else ""
        bound = f"{getattr(self._limits, field):g} s (run.watchdog.{field})"
        text = f"{phase.name}{at} has taken over {bound}; stacks are in {self._out / STACKS}"
        processes.leave(STALLED, text, phase=phase.name)

    def _write_stacks(self, code: int) -> None:
        if code != STALLED:
            return
        try:
            path = self._out / STACKS / f"process_{processes.index()}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                phase = self._phase
                file.write(f"{time.ctime()}: {phase.name} of step {phase.step}, {phase.seconds:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback(_STDERR)
