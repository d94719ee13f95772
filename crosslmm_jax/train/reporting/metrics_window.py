"""Metrics of the steps between two reports. They stay on the device until the report.

Fetching them after every step would make the host wait for the device.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple, TypedDict

import jax
import numpy as np
from jaxtyping import Float

from crosslmm_jax.batch import Batch
from crosslmm_jax.train.step import Metrics

# Steps that may be queued on the device. Two keep it busy while the host fetches the next batch; more would
# only hold more batches in its memory.
MAX_QUEUED_STEPS = 2


class NonFiniteStep(Exception):
    """A step whose loss or gradient is not finite."""

    def __init__(self, step: int, position: int) -> None:
        """`position` is the position of the data iterator before the step's batch."""
        super().__init__(f"step {step} is not finite")
        self.step = step
        self.position = position


class Report(TypedDict):
    """The last step's metrics, and times averaged over the steps of a window."""

    loss: float  # nats per target
    grad_norm: float
    targets: int
    gate: dict[str, Float[np.ndarray, " layers"]]  # by direction
    step_seconds: float
    input_wait_seconds: float  # per step
    input_wait_share: float  # of the window's time
    tokens_per_second: float


class _QueuedStep(NamedTuple):
    step: int
    position: int
    metrics: Metrics  # on the device


class MetricsWindow:
    """Collects metrics and times of the steps since the last report."""

    def __init__(self) -> None:
        """Starts the clock."""
        self._queued: list[_QueuedStep] = []
        self._last_metrics: Metrics = {}  # on the host
        self._reset()

    def _reset(self) -> None:
        self._steps, self._tokens, self._input_wait = 0, 0, 0.0
        self._started = time.perf_counter()

    def next_batch(self, iterator: Iterator[Batch[np.ndarray]]) -> Batch[np.ndarray]:
        """The next batch. The time that this takes is reported as waiting for input."""
        begin = time.perf_counter()
        batch = next(iterator)
        self._input_wait += time.perf_counter() - begin
        return batch

    def add(self, step: int, metrics: Metrics, *, position: int, tokens: int) -> None:
        """Records a step that was started. Waits for an earlier one when too many are queued.

        Args:
          step: its number.
          metrics: what the step returned, still on the device.
          position: position of the data iterator before its batch.
          tokens: number in its global batch, text and visual, padding included.
        """
        self._queued.append(_QueuedStep(step, position, metrics))
        self._steps += 1
        self._tokens += tokens
        if len(self._queued) > MAX_QUEUED_STEPS:
            jax.block_until_ready(self._queued[-1 - MAX_QUEUED_STEPS].metrics["loss"])

    def raise_if_not_finite(self) -> None:
        """Waits for all steps and raises `NonFiniteStep` for the first that is not finite."""
        fetched = jax.device_get([queued.metrics for queued in self._queued])
        for queued, metrics in zip(self._queued, fetched, strict=True):
            if not metrics["finite"]:
                raise NonFiniteStep(queued.step, queued.position)
            self._last_metrics = metrics
        self._queued = []

    def report(self) -> Report:
        """Reports the window and starts a new one.

        Raises:
          NonFiniteStep: a step of the window is not finite.
        """
        self.raise_if_not_finite()
        seconds = time.perf_counter() - self._started
        report: Report = {
            "loss": float(self._last_metrics["loss"]),
            "grad_norm": float(self._last_metrics["grad_norm"]),
            "targets": int(self._last_metrics["weight"]),
            "gate": self._last_metrics["gate"],
            "step_seconds": seconds / self._steps,
            "input_wait_seconds": self._input_wait / self._steps,
            "input_wait_share": self._input_wait / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self._reset()
        return report

    def exclude(self, seconds: float) -> None:
        """Excludes time that was not part of a step, such as starting a checkpoint."""
        self._started += seconds
