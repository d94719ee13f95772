"""Checkpoints with Orbax: state, position in the data and config, written while training continues.

A checkpoint appears under its final name only when it is complete. The newest one that all processes can read
is restored. Newer ones that some process cannot read are moved to another folder, never deleted.
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

from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import flatten
from crosslmm_jax.train.checksum import checksums
from crosslmm_jax.train.processes import FailedSomewhere, together
from crosslmm_jax.train.state import TrainState

logger = logging.getLogger(__name__)
Json = Mapping[str, Any]

_ERROR_NUMBER = re.compile(r"\[(?:os_error_code='|OS error )(\d+)")

# Fields that may differ from the checkpoint's: they change where or how fast a run computes, not what.
FREE_FIELDS = frozenset({
    "data.index", "data.deadline_s", "data.num_workers", "data.num_threads", "data.prefetch",
    "data.frame_cache_mb",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context",
    "model.attention", "model.cross_attention.cache_dtype", "model.decoder.remat",
    "model.vision.frame_chunk", "model.vision.keep_features", "model.vision.remat",
    "run.out", "run.log_every", "run.save_every", "run.keep_checkpoints", "run.tensorboard",
    "stage.microbatches",
})  # fmt: skip


class Checkpoints:
    """The checkpoints of one run. Every process of the run calls every method."""

    def __init__(self, folder: Path, *, keep: int, config: Json) -> None:
        """Opens `folder`, which is created if necessary.

        Args:
          folder: holds one folder per checkpoint, named by its step.
          keep: number of checkpoints to keep, the newest ones.
          config: the run's config as nested JSON values; saved with every checkpoint.
        """
        self.folder = folder.resolve()
        self._config = config
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, damaged or not."""
        return self._manager.latest_step()

    def is_complete(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step`. Raises a `ConfigError` if its config differs."""
        if self.latest_step() != step:
            return False
        try:
            together(lambda: self._check_config(step))
        except FailedSomewhere:
            return False  # damaged: `restore` logs it and tries an older one
        return True

    def _check_config(self, step: int) -> None:
        saved = self._read(step, config=ocp.args.JsonRestore())
        check_same_config(self._config, saved["config"], where=f"{self.folder}/{step}")

    def _read(self, step: int, **items: Any) -> Any:
        """This process's part of the items of a checkpoint.

        The manager's `restore` waits for all processes, and hangs when one of them cannot read.
        """
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
            return reader.restore(self.folder / str(step), args=ocp.args.Composite(**items))

    def save(self, step: int, state: TrainState, *, position: int) -> None:
        """Starts to write a checkpoint and returns as soon as the state may be changed.

        Raises:
          UserError: this checkpoint, or the one before, could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),  # type: ignore[arg-type]
            data=ocp.args.JsonSave({"position": position}),
            config=ocp.args.JsonSave(dict(self._config)),
            checksums=ocp.args.JsonSave(checksums(state)),
        )
        with self._writing():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until all saved checkpoints are on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of a full or broken disk into a `UserError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            if (reason := _system_reason(error)) is None:
                raise
            raise UserError(
                f"{self.folder}: a checkpoint was not written ({reason}); make room and run again"
            ) from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """The newest readable checkpoint as (state, position in the data); None if there are no checkpoints.

        Args:
          abstract: shapes, dtypes and shardings to restore to, on any mesh.

        Raises:
          ConfigError: the checkpoint was written with another config.
          UserError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                result = self._restore(step, abstract)
            except FailedSomewhere as error:
                logger.warning("checkpoint %s/%d is damaged: %s", self.folder, step, error)
                continue
            self._move_aside([damaged for damaged in steps if damaged > step])
            return result
        if steps:
            raise UserError(f"{self.folder}: no checkpoint of {steps} can be read; move the folder away")
        return None

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, int]:
        """Raises `FailedSomewhere` on all processes when one finds damage."""

        def read() -> Any:
            self._check_config(step)
            state = ocp.args.PyTreeRestore(
                item=abstract,  # type: ignore[arg-type]
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            )
            return self._read(
                step, state=state, data=ocp.args.JsonRestore(), checksums=ocp.args.JsonRestore()
            )

        restored = together(read)
        found = checksums(restored["state"])  # over all processes: each has read its part

        def compare() -> None:
            wrong = sorted(name for name in found if found[name] != restored["checksums"].get(name))
            if wrong:
                raise ValueError(f"checksums differ in {', '.join(wrong)}")

        together(compare)
        return restored["state"], int(restored["data"]["position"])

    def _move_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints away, so that new ones can have their step."""

        def move() -> None:
            for step in steps if jax.process_index() == 0 else []:
                target = _free_name(self.folder.with_name("checkpoints_damaged") / str(step))
                try:
                    target.parent.mkdir(exist_ok=True)
                    os.rename(self.folder / str(step), target)
                except OSError as error:
                    raise UserError(
                        f"{self.folder}/{step}: damaged, and cannot be moved to {target} ({error.strerror});"
                        " move it away"
                    ) from error
                logger.warning("checkpoint %d was moved to %s", step, target)

        if steps:
            together(move)
            self._manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether the scheduler asked some process of a run to stop. All processes get the same answer."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for checkpoints that are being written."""
        with self._writing():
            self._manager.close()


def _system_reason(error: Exception) -> str | None:
    """The operating system's reason for a failed write. tensorstore quotes its number in a ValueError."""
    if isinstance(error, OSError):
        return str(error)
    number = _ERROR_NUMBER.search(str(error))
    return os.strerror(int(number[1])) if number else None


def _free_name(path: Path) -> Path:
    """`path`, or `path` with the first suffix ".1", ".2", ... that is not taken."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{i}") for i in itertools.count(1)))
    return next(name for name in names if not name.exists())


def check_same_config(now: Json, saved: Json, *, where: str) -> None:
    """Raises a `ConfigError` that lists every field that differs and changes what a run computes."""
    flat_now, flat_saved = flatten(now), flatten(saved)
    names = sorted((flat_now.keys() | flat_saved.keys()) - FREE_FIELDS)
    absent = "(no such field)"
    different = [
        f"{name} was {flat_saved.get(name, absent)!r} and is {flat_now.get(name, absent)!r}"
        for name in names
        if flat_now.get(name, absent) != flat_saved.get(name, absent)
    ]
    if different:
        raise ConfigError(
            f"{where}: the checkpoint was written with another config: {'; '.join(different)};"
            " set them back, or choose another run.out"
        )


def state_bytes(abstract: TrainState) -> int:
    """Size in bytes of all arrays of a state."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def check_room(out: Path, needed: int) -> None:
    """Creates `out`. Raises a `UserError` unless it can be written and has `needed` bytes free."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write_test.{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"run.out {out}: {reason}; give a folder that can be written") from error
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(
            f"run.out {out}: {free / 1e9:.1f} GB are free; checkpoints and weights need"
            f" {needed / 1e9:.1f} GB: make room, or lower run.keep_checkpoints"
        )
