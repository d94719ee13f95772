"""What a run says while it trains: lines on the terminal, metrics.jsonl, TensorBoard, log.jsonl.

Every process has one, because what they measured is gathered at each report; process 0 writes.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from crosslmm_jax.batch import Batch, needed
from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import to_dict
from crosslmm_jax.data.loading import BatchIterator
from crosslmm_jax.model import ChosenBackend, attention_backends, flops
from crosslmm_jax.parallel import is_first_process, row_shard
from crosslmm_jax.train.guards import Watchdog
from crosslmm_jax.train.reporting.hosts import Hosts, idle_gpus
from crosslmm_jax.train.reporting.metrics_line import metrics_line, note_of
from crosslmm_jax.train.reporting.metrics_log import MAX_WAIT_S, MetricsLog
from crosslmm_jax.train.reporting.metrics_window import MetricsWindow, Phase
from crosslmm_jax.train.reporting.run_log import LOG_FILE, RunLog
from crosslmm_jax.train.reporting.side_channel import SideChannel
from crosslmm_jax.train.reporting.traces import StepTraces
from crosslmm_jax.train.reporting.wandb_log import WandbLog
from crosslmm_jax.train.reporting.work import WorkCounter
from crosslmm_jax.train.state import TrainState
from crosslmm_jax.train.step import Metrics
from crosslmm_jax.utils import Progress

_NAMES = {"encoder": "encoder", "self_attention": "self-attention", "v2v": "V2V", "t2v": "T2V"}


class Validated(NamedTuple):
    """What was found on held-out rows after a step."""

    loss: float  # nats per target
    accuracy: float  # share of the targets that are the most probable token, given the tokens before them
    targets: int
    rows: int
    seconds: float


class RunReport:
    """Collects what a run's steps take and give, and says it. Every process calls every method.

    Attributes:
      window: metrics and times of the steps since the last report.
    """

    def __init__(
        self, config: ExperimentConfig, mesh: Mesh, watchdog: Watchdog, *, resumed_step: int, quiet: bool
    ) -> None:
        """Opens the outputs.

        Args:
          config: the experiment.
          mesh: of all devices.
          watchdog: bounds the phases.
          resumed_step: steps that an earlier command has done.
          quiet: show nothing on the terminal.
        """
        self._config, self._mesh, self._resumed_step = config, mesh, resumed_step
        self.window, self._watchdog = MetricsWindow(), watchdog
        self._work = WorkCounter(config.model, config.stage, num_shards=row_shard(mesh)[1])
        self._peak_tflops = flops.peak_tflops(mesh.devices.flat[0].device_kind, config.model)
        self._compiled: set[tuple[object, ...]] = set()
        self._hosts = Hosts()
        run, stage, writes = config.run, config.stage, is_first_process()
        folder = Path(run.out)
        self._progress = SideChannel(
            "progress",
            lambda: Progress(
                stage.name, unit="steps", total=stage.steps, done=resumed_step, seconds_between_lines=None,
                quiet=quiet or not writes,
            ),
            warns=False,
        )  # fmt: skip
        self._metrics = (
            MetricsLog(folder, resumed_step=resumed_step, tensorboard=run.tensorboard) if writes else None
        )
        self._log = RunLog(folder) if writes else None
        self._traces = StepTraces(run)
        self._wandb: SideChannel[WandbLog] | None = None
        if writes and (project := run.wandb) is not None:
            self._wandb = SideChannel("Weights & Biases", lambda: WandbLog(folder, project, to_dict(config)))
            self._wandb.call(lambda log: log.begin())  # now, not at the first report

    def start(self, state: TrainState, *, num_rows: int, num_shapes: int) -> None:
        """Says what runs where, before the first step.

        Args:
          state: the state before it.
          num_rows: rows of the index.
          num_shapes: shapes of batches.
        """
        config, hosts, mesh = self._config, self._hosts, self._mesh
        trainable, frozen = (_num_params(tree) for tree in (state.trainable, state.frozen))
        axes = {name: int(size) for name, size in mesh.shape.items()}
        kind, out = mesh.devices.flat[0].device_kind, config.run.out
        microbatches = config.stage.microbatches
        self.event(
            "start", self._resumed_step,
            stage=config.stage.name, steps=config.stage.steps, resumed_step=self._resumed_step,
            hosts=hosts.names, devices=hosts.devices, gpus=hosts.gpus, device_kind=kind, mesh=axes,
            parameters={"total": trainable + frozen, "trainable": trainable},
            batch_size=config.data.batch_size, microbatches=microbatches, rows=num_rows, shapes=num_shapes,
            attention=config.model.attention, peak_tflops=self._peak_tflops, out=str(Path(out).resolve()),
            jax_version=jax.__version__,
        )  # fmt: skip
        shown = " ".join(f"{name}={size}" for name, size in axes.items())
        self.say(f"{mesh.size} x {kind}, mesh {shown}; {_on_hosts(hosts.names)}")
        for line in idle_gpus(hosts.names, hosts.devices, hosts.gpus):
            self.say(line)
        self.say(
            f"{trainable + frozen:,} parameters, {trainable:,} of them trainable; {config.data.batch_size}"
            f" rows per step out of {num_rows:,}, in {num_shapes} shape{'s' * (num_shapes != 1)}"
            + (f" and {microbatches} microbatches" if microbatches and microbatches > 1 else "")
        )
        begin = f"resumes after step {self._resumed_step}" if self._resumed_step else "starts at step 1"
        every = f"checkpoints/ every {config.run.save_every} steps"
        self.say(f"{begin} of {config.stage.steps}; metrics.jsonl, {LOG_FILE} and {every} in {out}")
        if self._peak_tflops is not None:
            self.say(f"100% of peak FLOPs: {self._peak_tflops:g} TFLOP/s per device, dense bfloat16")

    @contextlib.contextmanager
    def phase(self, step: int, name: Phase) -> Iterator[None]:
        """Counts the time inside as time of this step and phase, and bounds it."""
        with self._watchdog.phase(name), self.window.phase(step, name):
            yield

    @contextlib.contextmanager
    def program(
        self, step: int, name: str, batch: Batch[np.ndarray], *, is_step: bool = True
    ) -> Iterator[None]:
        """Runs a program on a batch inside; says so if it has to be compiled first.

        Args:
          step: number of the step.
          name: of the program.
          batch: of this process.
          is_step: whether the time is the step's own.
        """
        if is_step:
            self._traces.before(step)
        frames, text = _shape(batch)
        key = (name, type(batch.visible_frames), frames, text)
        if key in self._compiled:
            with self.phase(step, "dispatch") if is_step else self._watchdog.phase("validation"):
                yield
            return
        self._compiled.add(key)
        rows = f"{frames} frames and {text} text tokens per row"
        self.say(f"compiling the {name} for {rows}")
        begin = time.perf_counter()
        with attention_backends() as chosen:
            with self.phase(step, "compile") if is_step else self._watchdog.phase("compile"):
                yield
        seconds, backends = time.perf_counter() - begin, _summary(chosen)
        self.event(
            "compiled", step, program=name, frames=frames, text_tokens=text, seconds=round(seconds, 3),
            attention=backends,
        )  # fmt: skip
        shown = ", ".join(f"{_NAMES.get(name, name)} {backend}" for name, backend in backends.items())
        self.say(f"compiled in {seconds:.1f} s" + (f"; attention: {shown}" if shown else ""))

    def add(self, step: int, metrics: Metrics, *, position: int, batch: Batch[np.ndarray]) -> None:
        """Records a step that was started. Waits for an earlier one when too many are queued.

        Args:
          step: its number.
          metrics: what the step returned, still on the devices.
          position: position of the data iterator before its batch.
          batch: of this process.
        """
        self.window.add(step, metrics, position=position, work=self._work.count(batch), shape=_shape(batch))
        if self._traces.after(step, metrics):
            self._say_trace(step)
        self._progress.call(lambda bar: bar.update(step))

    def validated(self, step: int, found: Validated, *, is_best: bool) -> None:
        """Says what a validation found."""
        facts = {name: round(value, 6) for name, value in found._asdict().items()}
        self.event("validated", step, **facts, best=is_best)
        self.say(
            f"validation after step {step}: loss {found.loss:.4f}, accuracy {found.accuracy:.1%} of"
            f" {found.targets:,} targets in {found.rows:,} rows, {found.seconds:.1f} s"
            + ("; the best so far" if is_best else "")
        )

    def report(self, step: int, iterator: BatchIterator, *, validated: Validated | None = None) -> None:
        """Writes a line of metrics about the steps since the last one.

        Args:
          step: the last of them.
          iterator: gave their batches.
          validated: what a validation after the last one found.

        Raises:
          NonFiniteStep: a step of them is not finite.
        """
        window = self.window.report()
        shares = self._hosts.gather(window, bad_rows=iterator.take_bad_rows(), **iterator.take_counts())
        names = self._hosts.names
        line = metrics_line(
            step, window, shares, config=self._config, names=names, num_devices=self._mesh.size,
            peak_tflops=self._peak_tflops,
        )  # fmt: skip
        if validated is not None:
            line["validation"] = validated._asdict()
        for process, share in enumerate(shares):
            for row in share["bad_rows"]:
                self.event("bad_row", step, process=process, host=names[process], **row)
                if process != jax.process_index():  # this one has logged its own
                    what = f"row {row['row']} is replaced by another ({row['reason']}): {row['detail']}"
                    self.say(f"process {process} on {names[process]}: {what}")
        if self._metrics is not None:
            self._metrics.write(line)
        if self._wandb is not None:
            self._wandb.call(lambda log: log.write(line))
        note = note_of(line)
        self._progress.call(lambda bar: bar.report(step, note))

    def _say_trace(self, step: int) -> None:
        self.event("trace", step, steps=self._config.run.profile_steps, folder=str(self._traces.folder))
        self.say(f"a trace of steps {self._config.run.profile_steps} is in {self._traces.folder}")

    def say(self, text: str) -> None:
        """Shows a line on the terminal of process 0."""
        self._progress.call(lambda bar: bar.say(text))

    def event(self, event: str, step: int, **facts: object) -> None:
        """Adds an event to log.jsonl."""
        if self._log is not None:
            self._log.write(event, step, facts)

    def wait(self) -> None:
        """Returns when all lines are in metrics.jsonl, if its disk does not hang.

        Called before a checkpoint is written: a run that resumes from it finds the lines up to it.
        """
        if self._metrics is not None:
            self._metrics.wait()

    def close(self) -> None:
        """Closes the outputs."""
        if self._traces.close():
            self._say_trace(self._resumed_step)
        self._hosts.close()
        self._progress.close(MAX_WAIT_S)
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb is not None:
            self._wandb.close(MAX_WAIT_S)
        if self._log is not None:
            self._log.close(MAX_WAIT_S)


def _shape(batch: Batch[np.ndarray]) -> tuple[int, int]:
    """Frames and text tokens per row."""
    return needed(batch.frames, "frames").shape[1], batch.text_slots.shape[1]


def _num_params(tree: object) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _summary(chosen: Iterable[ChosenBackend]) -> dict[str, str]:
    """Name of each attention -> its backend, or backends."""
    backends: dict[str, list[str]] = {}
    for each in chosen:
        backends.setdefault(each.name, []).append(each.backend)
    return {name: "/".join(dict.fromkeys(used)) for name, used in backends.items()}


def _on_hosts(names: list[str]) -> str:
    """How many processes run on which hosts."""
    different = list(dict.fromkeys(names))
    listed = ", ".join(different[:8]) + (", ..." if len(different) > 8 else "")
    processes = f"{len(names)} process{'es' * (len(names) != 1)}"
    where = listed if len(different) == 1 else f"{len(different)} hosts: {listed}"
    return f"{processes} on {where}"
