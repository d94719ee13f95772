"""The training loop: when to step, report, save and stop.

    runs/x/checkpoints/           Orbax, one folder per checkpoint, named by its step
    runs/x/checkpoints_damaged/   damaged checkpoints, if there were any
    runs/x/metrics.jsonl          one line every `run.log_every` steps
    runs/x/log.jsonl              hosts, compiled programs, bad rows, with their times
    runs/x/tensorboard/           the same
    runs/x/traces/                of the steps `run.profile_steps`
    runs/x/model/                 MODEL folder, written at the end
    runs/x/owner.json             the process that trains there, while it does
    runs/x/stacks/                what the threads of a run did that the watchdog has ended

The command that started a run also resumes it: after a kill, a crash, or on another mesh.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from crosslmm_jax.batch import Batch, needed
from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.data.loading import BatchIterator, Dataset
from crosslmm_jax.errors import ConfigError, Interrupted, UserError
from crosslmm_jax.model import without_adapters
from crosslmm_jax.model_folder import check_replaceable, find_model_folder, is_model_folder, load_weights
from crosslmm_jax.parallel import (
    check_batch_size,
    gather,
    initialize_processes,
    is_first_process,
    make_mesh,
    processes,
    row_shard,
    to_global,
    together,
)
from crosslmm_jax.train.checkpoint import Checkpoints, check_disk_space, state_bytes
from crosslmm_jax.train.export_run import write_model
from crosslmm_jax.train.guards import RunOwner, StopRequest, Watchdog
from crosslmm_jax.train.initial import check_same_model, warn_of_other_inputs, warn_of_other_positions
from crosslmm_jax.train.memory import Shape, fewest_microbatches
from crosslmm_jax.train.reporting.metrics_log import MetricsLine, read_metrics
from crosslmm_jax.train.reporting.metrics_window import NonFiniteStep
from crosslmm_jax.train.reporting.run_report import RunReport, Validated
from crosslmm_jax.train.reporting.wandb_log import check_wandb
from crosslmm_jax.train.settings import check_same_settings, settings_of
from crosslmm_jax.train.state import TrainState, abstract_state, random_state, shardings_of, state_of_params
from crosslmm_jax.train.step import compile_train_step, with_step_visibility
from crosslmm_jax.train.validation import Validation, open_validation

_POSITION = "global_next_index"

logger = logging.getLogger(__name__)


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
      Stalled: of several processes, some did not start.
    """
    initialize_processes(config.run.watchdog)
    with (
        Watchdog(config.run.watchdog, Path(config.run.out)) as watchdog,
        StopRequest(deadline_s=config.run.stop_deadline_s) as stop,
    ):
        return _open(config, watchdog, stop, quiet=quiet)


def _open(config: ExperimentConfig, watchdog: Watchdog, stop: StopRequest, *, quiet: bool) -> TrainResult:
    mesh = make_mesh(config.mesh, rows=config.data.batch_size)
    abstract = abstract_state(config.model, config.stage, mesh)
    out = Path(config.run.out)
    _check_before_start(config, mesh, abstract, out)
    of_processes = gather(settings_of(config))
    check_same_settings(of_processes)
    with _owned(out) as owner:
        checkpoints = Checkpoints(
            out / "checkpoints", keep=config.run.keep_checkpoints,
            # Those of process 0, which writes them: on other hosts, paths such as data.tokenizer may differ.
            settings=of_processes[0], accept_changes=config.run.accept_changes,
        )  # fmt: skip
        with checkpoints:
            return _train(config, mesh, abstract, checkpoints, owner, watchdog, stop, quiet=quiet)


@contextlib.contextmanager
def _owned(out: Path) -> Iterator[RunOwner]:
    """Makes process 0 the owner of the run folder.

    All processes fail if another run owns it, or if it is another folder on one of their hosts.
    """
    owner = RunOwner(out)
    undo = processes.on_early_end(lambda code: owner.release())
    try:
        together(lambda: owner.claim() if is_first_process() else None)
        claimed_by = gather({"claim": owner.claimed_by})[0]["claim"]
        together(lambda: owner.check_shared(claimed_by))
        yield owner
    finally:
        undo()
        owner.release()


def _train(
    config: ExperimentConfig,
    mesh: Mesh,
    abstract: TrainState,
    checkpoints: Checkpoints,
    owner: RunOwner,
    watchdog: Watchdog,
    stop: StopRequest,
    *,
    quiet: bool,
) -> TrainResult:
    out, last = Path(config.run.out), config.stage.steps
    if checkpoints.is_complete(last) and is_model_folder(out / "model"):
        _say_changes(checkpoints, "this run is finished, so that these settings change nothing")
        return TrainResult(out / "model", last, read_metrics(out), {})
    dataset = _open_dataset(config)
    config = _with_microbatches(config, mesh, abstract, dataset)
    restored = checkpoints.restore(abstract)
    _say_changes(checkpoints, "this run resumes with other settings")
    state, position = restored or (_state_before_first_step(config, mesh), 0)
    resumed_step = int(state.step)
    if resumed_step > last:
        raise ConfigError(
            f"StageConfig.steps is {last}; the checkpoint in {out} has {resumed_step} steps: set it to"
            f" {resumed_step} or more, or choose another run.out"
        )
    position += -position % config.data.batch_size  # another batch size begins with the next whole batch
    index, count = row_shard(mesh)
    iterator = BatchIterator(dataset, global_next_index=position, shard_index=index, shard_count=count)
    validation = open_validation(config, mesh, dataset)
    run = _Run(config, mesh, checkpoints, owner, iterator, validation, watchdog, stop, quiet)
    with jax.set_mesh(mesh):
        state = run.to_last_step(state, resumed_step)
        with watchdog.phase("checkpoint"):
            checkpoints.wait()
            write_model(out / "model", config, state.params, tokenizer=config.data.tokenizer)
    return TrainResult(out / "model", resumed_step, read_metrics(out), dict(iterator.bad_rows))


def _say_changes(checkpoints: Checkpoints, what: str) -> None:
    if checkpoints.changes and is_first_process():
        logger.warning("%s: %s: %s", checkpoints.folder.parent, what, "; ".join(checkpoints.changes))


def _check_before_start(config: ExperimentConfig, mesh: Mesh, abstract: TrainState, out: Path) -> None:
    """Raises a UserError for what would fail later, before anything is compiled or written."""
    check_batch_size(config.data.batch_size, mesh, microbatches=config.stage.microbatches or 1)
    check_replaceable(out / "model")
    together(lambda: check_wandb(config.run.wandb) if is_first_process() else None)
    saves = -(-config.stage.steps // config.run.save_every)
    present = len(list((out / "checkpoints").glob("[0-9]*")))
    # One more than is kept: the oldest is deleted only after the newest is complete.
    kept = config.run.keep_checkpoints + (config.data.validation.enabled and config.data.validation.keep_best)
    new_checkpoints = max(min(saves, kept + 1) - present, 0)
    weights = jax.tree.leaves(without_adapters(abstract.params))
    model_bytes = sum(4 * leaf.size for leaf in weights)  # of the MODEL folder, float32
    check_disk_space(out, new_checkpoints * state_bytes(abstract) + model_bytes)


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
            f" {model.decoder.max_positions}: raise it to {longest}, or lower text_buckets, max_text_tokens"
            " or the frames"
        )
    return dataset


def _with_microbatches(
    config: ExperimentConfig, mesh: Mesh, abstract: TrainState, dataset: Dataset
) -> ExperimentConfig:
    """`config` with a number of microbatches, the same on all processes, if it leaves the choice."""
    if config.stage.microbatches is not None:
        return config
    memory = gather((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"))
    known = [each for each in memory if each is not None]
    count = fewest_microbatches(
        config.model, config.stage, abstract, dict(mesh.shape),
        [Shape(bucket.frames, bucket.text) for bucket in dataset.buckets],
        batch_size=config.data.batch_size, memory=min(known) if known else None,
    )  # fmt: skip
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, microbatches=count))


def _state_before_first_step(config: ExperimentConfig, mesh: Mesh) -> TrainState:
    """A state with the parameters of the MODEL folder `run.init_from`, or with random ones."""
    if config.run.init_from is None:
        return random_state(config.model, config.stage, mesh, seed=config.run.seed)
    folder = find_model_folder(config.run.init_from)
    check_same_model(folder, config.model)
    warn_of_other_inputs(folder, config.data)
    warn_of_other_positions(folder, config.model)
    wanted = without_adapters(abstract_state(config.model, config.stage, mesh).params)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, wanted)
    params = load_weights(folder, config.model, shardings=shardings_of(wanted), dtype=dtypes)
    return state_of_params(params, config.model, config.stage, mesh, seed=config.run.seed)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The steps of a run, and what stays the same during them."""

    config: ExperimentConfig
    mesh: Mesh
    checkpoints: Checkpoints
    owner: RunOwner
    iterator: BatchIterator
    validation: Validation | None
    watchdog: Watchdog
    stop: StopRequest
    quiet: bool

    def to_last_step(self, state: TrainState, resumed_step: int) -> TrainState:
        """Runs the remaining steps; closes the iterator and the report."""
        report = RunReport(self.config, self.mesh, self.watchdog, resumed_step=resumed_step, quiet=self.quiet)
        try:
            dataset = self.iterator.dataset
            report.start(state, num_rows=len(dataset.rows), num_shapes=len(dataset.buckets))
            return self._steps(state, resumed_step, report=report)
        except NonFiniteStep as error:
            raise self._save_batch_of(error) from error
        finally:
            self.iterator.close()
            report.close()

    def _steps(self, state: TrainState, resumed_step: int, *, report: RunReport) -> TrainState:
        run, stage = self.config.run, self.config.stage
        train_step = compile_train_step(self.config.model, stage, self.mesh)
        shard_count = row_shard(self.mesh)[1]
        for step in range(resumed_step + 1, stage.steps + 1):
            self.watchdog.enter("step", step)
            position = self.iterator.get_state()[_POSITION]
            with report.phase(step, "input_wait"):
                batch = next(self.iterator)
            batch = with_step_visibility(batch)
            with report.program(step, "training step", batch):
                state, metrics = train_step(state, to_global(batch, self.mesh, num_shards=shard_count))
            report.add(step, metrics, position=position, batch=batch)
            is_last = step == stage.steps
            validated, is_best = self._validate(step, state, report)
            if is_last or step == 1 or step % run.log_every == 0 or validated is not None:
                report.report(step, self.iterator, validated=validated)
            self.stop.nothing_to_save = False
            self.checkpoints.raise_if_failed()
            must_stop = self.stop.requested(step)
            if is_last or must_stop or is_best or step % run.save_every == 0:
                self._save(step, state, report)
            if must_stop and not is_last:
                with self.watchdog.phase("checkpoint"):
                    self.checkpoints.wait()
                raise Interrupted(f"stopped after step {step}, which is saved; the same command resumes")
        return state

    def _validate(self, step: int, state: TrainState, report: RunReport) -> tuple[Validated | None, bool]:
        """What a validation after this step found, if there is one, and whether it is the best so far."""
        validation, keeps_best = self.validation, self.config.data.validation.keep_best
        if validation is None or not validation.is_due(step):
            return None, False
        report.window.raise_if_not_finite()
        with report.phase(step, "validation"):
            found = validation.run(step, state.params, report, stopped=self.stop.heard)
        if found is None:
            return None, False
        validated, candidate = found
        is_best = keeps_best and candidate.beats(self.checkpoints.best)
        if is_best:
            self.checkpoints.best = candidate
        report.validated(step, validated, is_best=is_best)
        return validated, is_best

    def _save(self, step: int, state: TrainState, report: RunReport) -> None:
        report.window.raise_if_not_finite()  # a state that is not finite is never saved
        with report.phase(step, "checkpoint"):
            together(lambda: self.owner.check() if is_first_process() else None)
            report.wait()  # a run that resumes from this checkpoint finds the lines up to it
            self.checkpoints.save(step, state, position=self.iterator.get_state()[_POSITION])

    def _save_batch_of(self, error: NonFiniteStep) -> UserError:
        """Reads the batch again, which its position alone determines, and saves it for inspection."""
        self.iterator.set_state({_POSITION: error.position})
        batch = next(self.iterator)
        suffix = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = Path(self.config.run.out) / f"nonfinite_step_{error.step}{suffix}.npz"
        rows = [int(row) for row in needed(batch.row_index, "row_index")]
        saved = save_batch(path, batch)
        return UserError(
            f"loss or gradient is not finite at step {error.step}, rows {rows} of the index; {saved},"
            " checkpoints are unchanged: look at these rows, or lower stage.learning_rate and resume with"
            " --run.accept-changes"
        )


def save_batch(path: Path, batch: Batch[np.ndarray]) -> str:
    """Saves a batch for inspection. Returns where it is, or why it could not be saved."""
    try:
        np.savez(path, **batch.arrays())  # type: ignore[arg-type]
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()  # of which a part may have been written
        return f"the batch could not be saved in {path} ({error.strerror or error})"
    return f"the batch is in {path}"
