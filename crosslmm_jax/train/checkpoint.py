"""Orbax checkpoints: training state, position in the data and config, written while training continues.

    RUN/checkpoints/STEP/           appears under this name only when it is complete
    RUN/checkpoints_damaged/STEP/   damaged checkpoints are moved here, never deleted

`Checkpoints.restore` uses the newest undamaged checkpoint. `Checkpoints._restore_undamaged` decides: one is
damaged if any process cannot read it, or if a checksum of an array differs (`checksum.py`).
"""

import contextlib
import itertools
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from crosslmm_jax.config import ExperimentConfig, names_with_role
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import flatten
from crosslmm_jax.parallel import FailedSomewhere, succeed_on_all
from crosslmm_jax.train.checksum import array_checksums, check_undamaged
from crosslmm_jax.train.state import TrainState

logger = logging.getLogger(__name__)

# How tensorstore quotes the number of a system error in the text of a ValueError.
_ERROR_NUMBER = re.compile(r"\[(?:os_error_code='|OS error )(\d+)")

# Fields that may differ from the checkpoint's: they change where or how fast a run computes, not what.
_FREE_FIELDS = frozenset(names_with_role(ExperimentConfig, "performance", "host"))


class Checkpoints:
    """The checkpoints of one run. Every process of the run calls every method."""

    def __init__(self, folder: Path, *, keep: int, config: Mapping[str, object]) -> None:
        """Opens `folder`, creating it if it does not exist.

        Args:
          folder: has one folder per checkpoint, named by its step.
          keep: number of newest checkpoints to keep.
          config: the run's settings as nested dicts of JSON values, the same on every process; saved with
            every checkpoint.
        """
        self.folder = folder.resolve()
        self._config = config
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def is_complete(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step` and its config can be read.

        Raises:
          ConfigError: it was written with another config.
        """
        if self._manager.latest_step() != step:
            return False
        try:
            succeed_on_all(lambda: self._check_config(step))
        except FailedSomewhere:
            return False  # damaged: `restore` reports it and uses an older one
        return True

    def _check_config(self, step: int) -> None:
        saved = self._read(step, config=ocp.args.JsonRestore())
        check_same_config(self._config, saved["config"], where=f"{self.folder}/{step}")

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        """Reads items of a checkpoint: of arrays, the shards of this process.

        Not by the manager's own `restore`: it waits for all processes, and forever when one of them cannot
        read.
        """
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
            return reader.restore(self.folder / str(step), args=ocp.args.Composite(**items))

    def save(self, step: int, state: TrainState, *, position: int) -> None:
        """Starts to write a checkpoint; returns once `state` may be donated.

        Args:
          step: its name.
          state: the state after `step` updates.
          position: position of the data iterator.

        Raises:
          UserError: this or the previous checkpoint could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),  # type: ignore[arg-type]
            data=ocp.args.JsonSave({"position": position}),
            config=ocp.args.JsonSave(dict(self._config)),
            checksums=ocp.args.JsonSave(array_checksums(state)),
        )
        with self._disk_errors():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk; raises like `save`."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns the errors of a full or broken disk into a UserError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if (reason := _system_error(error)) is None:
                raise
            raise UserError(
                f"{self.folder}: a checkpoint was not written ({reason}); free space there and run the same"
                " command again"
            ) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """Restores the newest undamaged checkpoint and moves damaged newer ones aside.

        Args:
          abstract: shapes, dtypes and shardings to restore to; the mesh may differ from the saving run's.

        Returns:
          State and position in the data, or None when there is no checkpoint.

        Raises:
          ConfigError: the checkpoint was written with another config.
          UserError: all checkpoints are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                restored = self._restore_undamaged(step, abstract)
            except FailedSomewhere as error:
                logger.warning("checkpoint %s/%d is damaged: %s", self.folder, step, error)
                continue
            self._move_aside([damaged for damaged in steps if damaged > step])
            return restored
        if steps:
            raise UserError(
                f"{self.folder}: all checkpoints {steps} are damaged; move this folder away to start again"
                " from step 0"
            )
        return None

    def _restore_undamaged(self, step: int, abstract: TrainState) -> tuple[TrainState, int]:
        """Restores one checkpoint, or raises FailedSomewhere on all processes if it is damaged.

        It is damaged if a process cannot read its shards, or if a checksum differs from the saved one.
        """

        def read() -> Any:
            self._check_config(step)
            state = ocp.args.PyTreeRestore(
                item=abstract,  # type: ignore[arg-type]
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            )
            return self._read(
                step, state=state, data=ocp.args.JsonRestore(), checksums=ocp.args.JsonRestore()
            )

        restored = succeed_on_all(read)
        # Checksums of sharded arrays are a collective operation: only once every process has its shards.
        found = array_checksums(restored["state"])
        succeed_on_all(lambda: check_undamaged(found, restored["checksums"]))
        return restored["state"], int(restored["data"]["position"])

    def _move_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints away, so that new ones can take their names."""

        def move() -> None:
            for step in steps if jax.process_index() == 0 else []:
                target = _free_name(self.folder.with_name("checkpoints_damaged") / str(step))
                try:
                    target.parent.mkdir(exist_ok=True)
                    os.rename(self.folder / str(step), target)
                except OSError as error:
                    raise UserError(
                        f"{self.folder}/{step}: damaged, and cannot be moved to {target} ({error.strerror});"
                        " move it away and run the same command again"
                    ) from error
                logger.warning("checkpoint %d was moved to %s", step, target)

        if steps:
            succeed_on_all(move)
            self._manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether the scheduler asked a process of a multi-process run to stop; all processes agree."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for checkpoints that are being written; raises like `save`."""
        with self._disk_errors():
            self._manager.close()


def _system_error(error: Exception) -> str | None:
    """The system's reason for a failed write, or None if the error is another one."""
    if isinstance(error, OSError):
        return str(error)
    number = _ERROR_NUMBER.search(str(error))
    return os.strerror(int(number[1])) if number else None


def _free_name(path: Path) -> Path:
    """`path`, or `path` with the first suffix ".1", ".2", ... that is not taken."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{i}") for i in itertools.count(1)))
    return next(name for name in names if not name.exists())


def check_same_config(now: Mapping[str, object], saved: Mapping[str, object], *, where: str) -> None:
    """Raises a ConfigError listing the fields that differ and that decide what a run computes.

    Args:
      now: settings of this run, nested dicts of JSON values.
      saved: settings in the checkpoint.
      where: the checkpoint's path, for the message.
    """
    flat_now, flat_saved = flatten(now), flatten(saved)
    names = sorted((flat_now.keys() | flat_saved.keys()) - _FREE_FIELDS)
    absent = "(no such field)"
    different = [
        f"{name} was {flat_saved.get(name, absent)!r} and is {flat_now.get(name, absent)!r}"
        for name in names
        if flat_now.get(name, absent) != flat_saved.get(name, absent)
    ]
    if different:
        raise ConfigError(
            f"{where}: this checkpoint was written with another config: {'; '.join(different)};"
            " set these fields back, or choose another run.out"
        )


def state_bytes(abstract: PyTree) -> int:
    """Bytes of all arrays in a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def check_disk_space(out: Path, needed: int) -> None:
    """Creates the folder `out` and checks that it can be written and that `needed` bytes are free.

    Raises:
      UserError: it cannot be written, or there is too little space.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write_test.{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"run.out {out}: {reason}; name a folder that can be written") from error
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(
            f"run.out {out}: {free / 1e9:.1f} GB are free; checkpoints and weights need"
            f" {needed / 1e9:.1f} GB: free space there, or lower run.keep_checkpoints"
        )
