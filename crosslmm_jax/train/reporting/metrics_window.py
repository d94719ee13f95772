"""Metrics of the steps between two reports, and where their time went.

Metrics stay on the device until the report: fetching them after every step would make the host wait for the
device. The time of a step is the time that this process spent on it, by phase:

    input_wait   waiting for its batch
    compile      compiling the program for its shape
    dispatch     sending its batch to the devices and starting it
    device_wait  waiting for the devices, with nothing else to do
    checkpoint   until training could go on after a checkpoint
    validation   held-out rows
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from crosslmm_jax.train.reporting.work import Work, total_work
from crosslmm_jax.train.step import Metrics

Phase = Literal["input_wait", "compile", "dispatch", "device_wait", "checkpoint", "validation"]

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


class StepTimes:
    """Seconds of one step in this process, by phase, and the shape of its batch."""

    def __init__(self) -> None:
        self.phases: dict[Phase, float] = {}
        self.work = Work()
        self.shape: tuple[int, int] = (0, 0)  # frames and text tokens per row

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.phases.values())

    @property
    def own(self) -> float:
        """Seconds in which the devices, and with them all processes, may wait for this process.

        Not those of dispatch: on a CPU, and when a device's queue is full, it waits for the other processes.
        """
        return self.phases.get("input_wait", 0.0)


class Window(NamedTuple):
    """What this process knows of the steps between two reports."""

    loss: float  # nats per target, of the last step
    grad_norm: float  # of the last step
    gate: dict[str, Float[np.ndarray, " layers"]]  # by direction, after the last step
    targets: int  # of the last step
    total_targets: int
    work: Work  # of all steps
    steps: int
    seconds: float
    phases: dict[Phase, float]  # seconds of all steps
    slowest: tuple[int, StepTimes]  # the step that took longest
    longest_own: tuple[int, StepTimes]  # the step for which this process itself took longest
    median: float  # seconds of a step


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
        self._times: dict[int, StepTimes] = {}
        self._steps, self._targets = 0, 0.0
        self._started = time.perf_counter()

    def _of(self, step: int) -> StepTimes:
        return self._times.setdefault(step, StepTimes())

    @contextlib.contextmanager
    def phase(self, step: int, name: Phase) -> Iterator[None]:
        """Counts the time inside as time of this step and phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            phases = self._of(step).phases
            phases[name] = phases.get(name, 0.0) + time.perf_counter() - begin

    def add(self, step: int, metrics: Metrics, *, position: int, work: Work, shape: tuple[int, int]) -> None:
        """Records a step that was started. Waits for an earlier one when too many are queued.

        Args:
          step: its number.
          metrics: what the step returned, still on the device.
          position: position of the data iterator before its batch.
          work: what its batch holds.
          shape: frames and text tokens per row.
        """
        self._queued.append(_QueuedStep(step, position, metrics))
        self._of(step).work, self._of(step).shape = work, shape
        self._steps += 1
        if len(self._queued) > MAX_QUEUED_STEPS:
            self._wait_for(self._queued[-1 - MAX_QUEUED_STEPS])

    def _wait_for(self, queued: _QueuedStep) -> None:
        with self.phase(queued.step, "device_wait"):
            jax.block_until_ready(queued.metrics["loss"])

    def raise_if_not_finite(self) -> None:
        """Waits for all steps and raises `NonFiniteStep` for the first that is not finite."""
        for queued in self._queued:
            self._wait_for(queued)
        fetched = jax.device_get([queued.metrics for queued in self._queued])
        for queued, metrics in zip(self._queued, fetched, strict=True):
            if not metrics["finite"]:
                raise NonFiniteStep(queued.step, queued.position)
            self._last_metrics = metrics
            self._targets += float(metrics["weight"])
        self._queued = []

    def report(self) -> Window:
        """Reports the window, which has at least one step, and starts a new one.

        Raises:
          NonFiniteStep: a step of the window is not finite.
        """
        self.raise_if_not_finite()
        phases: dict[Phase, float] = {}
        for times in self._times.values():
            for name, seconds in times.phases.items():
                phases[name] = phases.get(name, 0.0) + seconds
        last = self._last_metrics
        window = Window(
            loss=float(last["loss"]), grad_norm=float(last["grad_norm"]), gate=last["gate"],
            targets=int(last["weight"]), total_targets=int(self._targets),
            work=total_work(times.work for times in self._times.values()),
            steps=self._steps, seconds=time.perf_counter() - self._started, phases=phases,
            slowest=max(self._times.items(), key=lambda item: item[1].total),
            longest_own=max(self._times.items(), key=lambda item: item[1].own),
            median=statistics.median(times.total for times in self._times.values()),
        )  # fmt: skip
        self._reset()
        return window
