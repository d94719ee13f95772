"""Checkpoints with Orbax: state, position in the data and config, written while training goes on.

A checkpoint appears under its final name only when complete. The newest that can be read is used; one that
cannot is moved aside, never deleted.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.train.checksum import checksums
from crosslmm_jax.train.state import TrainState

logger = logging.getLogger(__name__)

# Settings that may differ from the checkpoint's: they change where or how fast a run computes, not what.
FREE_FIELDS = frozenset({
    "data.index", "data.num_workers", "data.num_threads", "data.prefetch", "data.frame_cache_mb",
    "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context",
    "model.attention", "model.cross_attention.cache_dtype", "model.decoder.remat",
    "model.vision.frame_chunk", "model.vision.keep_features", "model.vision.remat",
    "run.out", "run.log_every", "run.save_every", "run.keep_checkpoints", "run.tensorboard",
    "stage.microbatches",
})  # fmt: skip


class Checkpoints:
    """The checkpoints of one run. Every process of the run calls every method."""

    def __init__(self, folder: Path, *, keep: int, config: Mapping[str, Any]) -> None:
        """Opens `folder`, which is made if need be.

        Args:
          folder: of the checkpoints, one folder a step inside.
          keep: how many of the newest stay.
          config: of the run, nested dicts as JSON holds them; saved with every checkpoint.
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
        """Whether the newest checkpoint is that of `step`; raises `ConfigError` if of another config."""
        if self.latest_step() != step:
            return False
        try:
            self._check_config(step)
        except UserError:
            raise
        except Exception:
            return False  # damaged: `restore` says so and looks for another one
        return True

    def _check_config(self, step: int) -> None:
        saved = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        check_same_config(self._config, saved["config"], where=f"{self.folder}/{step}")

    def save(self, step: int, state: TrainState, *, position: int) -> None:
        """Starts to write a checkpoint; returns once the state may change again.

        Raises:
          UserError: the one before, or this one, could not be written.
        """
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),  # type: ignore[arg-type]
            data=ocp.args.JsonSave({"position": position}),
            config=ocp.args.JsonSave(dict(self._config)),
            checksums=ocp.args.JsonSave(checksums(state)),
        )
        try:
            self._manager.save(step, args=items, force=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: a checkpoint was not written ({error}); make room and run again")

    def restore(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """The newest readable checkpoint as (state, position in the data); None when there is none at all.

        Args:
          abstract: shapes, dtypes and shardings to restore to; any mesh will do.

        Raises:
          ConfigError: the checkpoint was written under another config.
          UserError: there are checkpoints, but none can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                result = self._restore(step, abstract)
            except (UserError, MemoryError):
                raise
            except Exception as error:
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                logger.warning("checkpoint %s/%d is damaged: %s", self.folder, step, _first_line(error))
                continue
            self._move_aside([damaged for damaged in steps if damaged > step])
            return result
        if steps:
            raise UserError(f"{self.folder}: no checkpoint of {steps} can be read; move the folder away")
        return None

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, int]:
        self._check_config(step)
        restore = ocp.args.PyTreeRestore(
            item=abstract,  # type: ignore[arg-type]
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        )
        items = ocp.args.Composite(
            state=restore, data=ocp.args.JsonRestore(), checksums=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        found, saved = checksums(restored["state"]), restored["checksums"]
        wrong = sorted(name for name in found if found[name] != saved.get(name))
        if wrong:
            raise ValueError(f"checksums differ in {', '.join(wrong)}")
        return restored["state"], int(restored["data"]["position"])

    def _move_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints out of the way of new ones with their step."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self.folder.with_name("checkpoints_damaged") / str(step)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                os.rename(self.folder / str(step), target)
                logger.warning("checkpoint %d was moved to %s", step, target)
        _sync("damaged checkpoints")
        self._manager.reload()

    def preempted(self, step: int) -> bool:
        """Whether the scheduler asked some process of a multi-process run to stop: the same answer on all."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for what is being written."""
        try:
            self._manager.close()
        except OSError as error:
            raise self._unwritable(error) from error


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def check_same_config(now: Mapping[str, Any], saved: Mapping[str, Any], *, where: str) -> None:
    """Raises a `ConfigError` naming every field that changes what a run computes and differs."""
    flat_now, flat_saved = _flatten(now), _flatten(saved)
    names = sorted((flat_now.keys() | flat_saved.keys()) - FREE_FIELDS)
    absent = "(no such field)"
    different = [
        f"{name} was {flat_saved.get(name, absent)!r} and is {flat_now.get(name, absent)!r}"
        for name in names
        if flat_now.get(name, absent) != flat_saved.get(name, absent)
    ]
    if different:
        raise ConfigError(
            f"{where}: the checkpoint is of a run with another config: {'; '.join(different)};"
            " set them back, or choose another run.out"
        )


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + key
        flat.update(_flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def state_bytes(abstract: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def check_room(out: Path, needed: int) -> None:
    """Makes the folder `out`; raises a `UserError` unless it can be written and has `needed` bytes free."""
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
