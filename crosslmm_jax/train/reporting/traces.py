"""A profiler's trace of some steps, for XProf or Perfetto."""

import logging
from pathlib import Path

import jax

from crosslmm_jax.config import RunConfig

TRACES = "traces"  # folder within the run folder

logger = logging.getLogger(__name__)


class StepTraces:
    """Traces the steps of `run.profile_steps`. A trace that fails is warned of and stops nothing."""

    def __init__(self, run: RunConfig) -> None:
        """Starts nothing yet."""
        self._steps, self._traces_now = run.profiled, False
        suffix = f"process_{jax.process_index()}" if jax.process_count() > 1 else ""
        self.folder = Path(run.out) / TRACES / suffix

    def before(self, step: int) -> None:
        """Starts the trace, if this is its first step."""
        if self._steps is not None and step == self._steps[0]:
            try:
                jax.profiler.start_trace(str(self.folder))
                self._traces_now = True
            except Exception as error:  # the profiler raises errors of many types
                logger.warning("%s: steps cannot be traced (%s)", self.folder, error)

    def after(self, step: int, result: object) -> bool:
        """Ends the trace if this was its last step, whose result it waits for. Whether it was written."""
        if not self._traces_now or self._steps is None or step < self._steps[1]:
            return False
        jax.block_until_ready(result)
        return self.close()

    def close(self) -> bool:
        """Ends the trace, if there is one. Whether it was written."""
        if not self._traces_now:
            return False
        self._traces_now = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:  # likewise, for a disk that is full among others
            logger.warning("%s: the trace was not written (%s)", self.folder, error)
            return False
        return True
