"""The steps between two reports: their metrics stay on the device until somebody looks."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from crosslmm_jax.batch import Batch

# Steps that may be queued on the device. Two keep it busy while the host fetches the next batch; more would
# only hold more batches in its memory.
RUN_AHEAD = 2


class NonFiniteStep(Exception):
    """A step whose loss or gradient is not finite."""

    def __init__(self, step: int, position: int) -> None:
        """`position`: where the step's batch starts in the data."""
        super().__init__(f"step {step} is not finite")
        self.step = step
        self.position = position


class _Pending(NamedTuple):
    step: int
    position: int
    metrics: Any


class Window:
    """Collects what happens in the steps since the last report."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._pending: list[_Pending] = []
        self._last: Any = None
        self._reset()

    def _reset(self) -> None:
        self._steps, self._tokens, self._wait = 0, 0, 0.0
        self._started = time.perf_counter()

    def next_batch(self, iterator: Iterator[Batch[np.ndarray]]) -> Batch[np.ndarray]:
        """The next batch; the time that it takes counts as waiting for input."""
        begin = time.perf_counter()
        batch = next(iterator)
        self._wait += time.perf_counter() - begin
        return batch

    def add(self, step: int, metrics: Any, *, position: int, tokens: int) -> None:
        """A step was started. Waits for an earlier one when too many are queued.

        Args:
          step: its number.
          metrics: what the step returned, still on the device.
          position: where its batch starts in the data.
          tokens: in its global batch, text and visual, padding included.
        """
        self._pending.append(_Pending(step, position, metrics))
        self._steps += 1
        self._tokens += tokens
        if len(self._pending) > RUN_AHEAD:
            jax.block_until_ready(self._pending[-1 - RUN_AHEAD].metrics["loss"])

    def check(self) -> None:
        """Waits for all steps; raises `NonFiniteStep` on the first that is not finite."""
        fetched = jax.device_get([pending.metrics for pending in self._pending])
        for pending, metrics in zip(self._pending, fetched, strict=True):
            if not metrics["finite"]:
                raise NonFiniteStep(pending.step, pending.position)
            self._last = metrics
        self._pending = []

    def report(self) -> dict[str, Any]:
        """The last step's metrics and the mean times a step since the last report; starts a new window.

        Returns:
          loss, grad_norm, targets, gate (direction -> float32[layers]), step_seconds, input_wait_seconds,
          input_wait_share (of the time), tokens_per_second.

        Raises:
          NonFiniteStep: as `check`.
        """
        self.check()
        seconds = time.perf_counter() - self._started
        report = {
            "loss": float(self._last["loss"]),
            "grad_norm": float(self._last["grad_norm"]),
            "targets": int(self._last["weight"]),
            "gate": self._last["gate"],
            "step_seconds": seconds / self._steps,
            "input_wait_seconds": self._wait / self._steps,
            "input_wait_share": self._wait / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._reset()
        return report

    def leave_out(self, seconds: float) -> None:
        """Time that was no part of a step, such as starting a checkpoint."""
        self._started += seconds
