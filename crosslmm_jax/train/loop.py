"""The training loop: when to step, report, save and stop.

    runs/x/checkpoints/           Orbax, one folder per checkpoint, named by its step
    runs/x/checkpoints_damaged/   damaged checkpoints, if there were any
    runs/x/metrics.jsonl          one line every `run.log_every` steps
    runs/x/tensorboard/           the same
    runs/x/model/                 MODEL folder, written at the end

The command that started a run also resumes it: after a kill, a crash, or on another mesh.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from crosslmm_jax.batch import needed
from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import to_dict
from crosslmm_jax.data.index import open_index
from crosslmm_jax.data.loading import BatchIterator, Dataset
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model import logical_axes
from crosslmm_jax.model_folder import check_replaceable, is_model_folder, load_weights, save_model_folder
from crosslmm_jax.parallel import (
    check_batch_size,
    gather,
    initialize_processes,
    make_mesh,
    param_shardings,
    row_shard,
    to_global,
)
from crosslmm_jax.train.checkpoint import Checkpoints, check_disk_space, state_bytes
from crosslmm_jax.train.initial import check_same_model, warn_of_other_inputs
from crosslmm_jax.train.interrupt import Interrupted, StopRequest
from crosslmm_jax.train.metrics_log import MetricsLine, MetricsLog, read_metrics
from crosslmm_jax.train.metrics_window import MetricsWindow, NonFiniteStep
from crosslmm_jax.train.optimizer import learning_rates
from crosslmm_jax.train.processes import check_same_settings
from crosslmm_jax.train.stages import model_of_stage
from crosslmm_jax.train.state import TrainState, abstract_state, random_state, state_of_params
from crosslmm_jax.train.step import compile_train_step, with_step_visibility
from crosslmm_jax.utils import Progress

_POSITION = "global_next_index"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    model_folder: Path
    resumed_step: int  # 0 if it did not resume
    metrics: list[MetricsLine]
    bad_rows: Mapping[int, str]  # row number -> why its media could not be read, on this host


def train(config: ExperimentConfig, *, quiet: bool = False) -> TrainResult:
    """Trains one stage to its last step. Resumes from the newest undamaged checkpoint in `run.out`.

    Args:
      config: the experiment.
      quiet: show no progress on stderr.

    Raises:
      UserError: settings that do not fit or that differ between processes, an output folder that cannot be
        used, a checkpoint of another config, data that cannot be read, or a loss that is not finite.
        Checkpoints stay unchanged.
      Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """
    initialize_processes()
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config.model, config.stage, mesh)
    out = Path(config.run.out)
    _check_before_start(config, mesh, abstract, out)
    # The digest stands for the rows: the path of their index may differ between hosts and over time.
    settings = to_dict(config) | {"index_digest": open_index(config.data.index).digest}
    of_processes = gather(settings)
    check_same_settings(of_processes)
    # Those of process 0, which writes them: on other hosts, paths such as data.tokenizer may differ.
    checkpoints = Checkpoints(out / "checkpoints", keep=config.run.keep_checkpoints, config=of_processes[0])
    try:
        if checkpoints.is_complete(config.stage.steps) and is_model_folder(out / "model"):
            return TrainResult(out / "model", config.stage.steps, read_metrics(out), {})
        dataset = _open_dataset(config)
        restored = checkpoints.restore(abstract)
        state, position = restored or (_state_before_first_step(config, mesh), 0)
        resumed_step = int(state.step)
        index, count = row_shard(mesh)
        iterator = BatchIterator(dataset, global_next_index=position, shard_index=index, shard_count=count)
        run = _Run(config, mesh, checkpoints, iterator, count, quiet)
        with jax.set_mesh(mesh):
            state = run.to_last_step(state, resumed_step)
        checkpoints.wait()
        _write_model(config, out / "model", state)
        return TrainResult(out / "model", resumed_step, read_metrics(out), dict(iterator.bad_rows))
    finally:
        checkpoints.close()


def _check_before_start(config: ExperimentConfig, mesh: Mesh, abstract: TrainState, out: Path) -> None:
    """Raises a UserError for what would fail later, before anything is compiled or written."""
    check_batch_size(config.data.batch_size, mesh, microbatches=config.stage.microbatches)
    check_replaceable(out / "model")
    saves = -(-config.stage.steps // config.run.save_every)
    present = len(list((out / "checkpoints").glob("[0-9]*")))
    # One more than is kept: the oldest is deleted only after the newest is complete.
    new_checkpoints = max(min(saves, config.run.keep_checkpoints + 1) - present, 0)
    check_disk_space(out, new_checkpoints * state_bytes(abstract) + state_bytes(abstract.params))


def _open_dataset(config: ExperimentConfig) -> Dataset:
    """The run's dataset; raises a ConfigError if its tokens or rows do not fit the model."""
    model = config.model
    dataset = Dataset(
        config.data, tokens_per_frame=model.merge.tokens_per_frame, image_size=model.vision.image_size
    )
    num_tokens = dataset.tokenizer.vocab_size
    if num_tokens > model.decoder.vocab_size:
        raise ConfigError(
            f"DecoderConfig.vocab_size is {model.decoder.vocab_size}; it must be at least {num_tokens},"
            f" the number of tokens of {config.data.tokenizer}"
        )
    longest = max(bucket.text + bucket.frames * dataset.tokens_per_frame for bucket in dataset.buckets)
    if longest > model.decoder.max_positions:
        raise ConfigError(
            f"DataConfig: text and frames make rows of up to {longest} tokens; the decoder's max_positions is"
            f" {model.decoder.max_positions}: lower text_buckets, max_text_tokens or the frames"
        )
    return dataset


def _state_before_first_step(config: ExperimentConfig, mesh: Mesh) -> TrainState:
    """A state with the parameters of the MODEL folder `run.init_from`, or with random ones."""
    if config.run.init_from is None:
        return random_state(config.model, config.stage, mesh, seed=config.run.seed)
    check_same_model(config.run.init_from, config.model)
    warn_of_other_inputs(config.run.init_from, config.data)
    shapes = abstract_state(config.model, config.stage, mesh).params
    shardings = param_shardings(logical_axes(config.model), shapes, mesh)
    params = load_weights(config.run.init_from, config.model, shardings=shardings, dtype="float32")
    return state_of_params(params, config.model, config.stage, mesh)


def _write_model(config: ExperimentConfig, folder: Path, state: TrainState) -> None:
    save_model_folder(
        folder,
        config=model_of_stage(config.model, config.stage),
        params=state.params,
        tokenizer_folder=config.data.tokenizer,
        sampling=config.data.sampling,
        system_prompt=config.data.system_prompt,
        time_instruction=config.data.time_instruction,
        resampling=config.data.resampling,
        started_from=config.run.init_from,
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """The steps of a run, and what stays the same during them."""

    config: ExperimentConfig
    mesh: Mesh
    checkpoints: Checkpoints
    iterator: BatchIterator
    shard_count: int
    quiet: bool

    def to_last_step(self, state: TrainState, resumed_step: int) -> TrainState:
        """Runs the remaining steps; closes the iterator, the progress and the metrics log."""
        run, stage, writes = self.config.run, self.config.stage, jax.process_index() == 0
        out = Path(run.out)
        progress = Progress(
            stage.name, unit="steps", total=stage.steps, done=resumed_step, seconds_between_lines=None,
            quiet=self.quiet or not writes,
        )  # fmt: skip
        log = MetricsLog(out, resumed_step=resumed_step, tensorboard=run.tensorboard) if writes else None
        try:
            with StopRequest(enabled=jax.process_count() == 1) as stop:
                return self._steps(state, resumed_step, progress=progress, log=log, stop=stop)
        except NonFiniteStep as error:
            raise self._save_batch_of(error) from error
        finally:
            self.iterator.close()
            progress.close()
            if log is not None:
                log.close()

    def _steps(
        self,
        state: TrainState,
        resumed_step: int,
        *,
        progress: Progress,
        log: MetricsLog | None,
        stop: StopRequest,
    ) -> TrainState:
        run, stage = self.config.run, self.config.stage
        train_step = compile_train_step(self.config.model, stage, self.mesh)
        window = MetricsWindow()
        for step in range(resumed_step + 1, stage.steps + 1):
            position = self.iterator.get_state()[_POSITION]
            batch = with_step_visibility(window.next_batch(self.iterator))
            state, metrics = train_step(state, to_global(batch, self.mesh, num_shards=self.shard_count))
            tokens = batch.tokens.size * self.shard_count
            window.add(step, metrics, position=position, tokens=tokens)
            is_last = step == stage.steps
            if is_last or step == 1 or step % run.log_every == 0:
                self._report(step, window, progress=progress, log=log)
            progress.update(step)
            must_stop = stop.signal_name or self.checkpoints.preempted(step)
            if is_last or must_stop or step % run.save_every == 0:
                self._save(step, state, window)
            if must_stop and not is_last:
                self.checkpoints.wait()
                raise Interrupted(f"stopped after step {step}, which is saved; the same command resumes")
        return state

    def _report(
        self, step: int, window: MetricsWindow, *, progress: Progress, log: MetricsLog | None
    ) -> None:
        line: MetricsLine = {"step": step, **window.report(), **self.iterator.take_counts()}
        gates = line.pop("gate")
        line["learning_rate"] = learning_rates(self.config.stage, step - 1)
        line["gate"] = {
            direction: {
                str(layer): float(gate)
                for layer, gate in zip(self.config.model.cross_attention_layers, values, strict=True)
            }
            for direction, values in gates.items()
        }
        if log is not None:
            log.write(line)
        progress.report(step, f"loss {line['loss']:.4f}  {line['step_seconds'] * 1e3:.0f} ms/step")

    def _save(self, step: int, state: TrainState, window: MetricsWindow) -> None:
        window.raise_if_not_finite()  # a state that is not finite is never saved
        begin = time.perf_counter()
        self.checkpoints.save(step, state, position=self.iterator.get_state()[_POSITION])
        window.exclude(time.perf_counter() - begin)

    def _save_batch_of(self, error: NonFiniteStep) -> UserError:
        """Reads the batch again, which its position alone determines, and saves it for inspection."""
        self.iterator.set_state({_POSITION: error.position})
        batch = next(self.iterator)
        suffix = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = Path(self.config.run.out) / f"nonfinite_step_{error.step}{suffix}.npz"
        np.savez(path, **batch.arrays())  # type: ignore[arg-type]
        rows = [int(row) for row in needed(batch.row_index, "row_index")]
        return UserError(
            f"loss or gradient is not finite at step {error.step}, rows {rows} of the index; the batch is in"
            f" {path}, checkpoints are unchanged: look at these rows or lower stage.learning_rate"
        )
