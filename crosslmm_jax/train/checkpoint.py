"""Orbax checkpoints: training state, position in the data and config, written while training continues.

    RUN/checkpoints/STEP/           appears under this name only when it is complete
    RUN/checkpoints_damaged/STEP/   damaged checkpoints are moved here, never deleted

`Checkpoints.restore` uses the newest undamaged checkpoint. `Checkpoints._restore_undamaged` decides: one is
damaged if any process cannot read it, or if a checksum of an array differs (`checksum.py`).
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from crosslmm_jax.errors import UserError
from crosslmm_jax.parallel import FailedSomewhere, is_first_process, succeed_on_all
from crosslmm_jax.train.checksum import array_checksums, check_undamaged
from crosslmm_jax.train.settings import Settings, check_resumable, with_known_digests
from crosslmm_jax.train.state import TrainState

logger = logging.getLogger(__name__)

# How tensorstore quotes the number of a system error in the text of a ValueError.
_ERROR_NUMBER = re.compile(r"\[(?:os_error_code='|OS error )(\d+)")


class Best(NamedTuple):
    """The step with the smallest validation loss so far."""

    step: int
    loss: float
    rows: str  # which rows it was: losses of other rows are no comparison

    def beats(self, other: "Best | None") -> bool:
        """Whether this loss is smaller, or of other rows."""
        return other is None or other.rows != self.rows or self.loss < other.loss


class _Saved(Protocol):
    """What Orbax says of a checkpoint."""

    step: int


@dataclasses.dataclass
class _NewestAndBest:
    """Keeps the newest checkpoints, and that of the best step; one of Orbax's preservation policies."""

    keep: int
    best: Callable[[], Best | None]

    def should_preserve(self, checkpoints: Sequence[_Saved], *, context: object) -> list[bool]:
        """Whether to keep each of the checkpoints, which are in order."""
        newest, best = len(checkpoints) - self.keep, self.best()
        return [
            place >= newest or (best is not None and checkpoint.step == best.step)
            for place, checkpoint in enumerate(checkpoints)
        ]


# What writing in the background has met; Orbax's thread only logs it in time.
_background_errors: list[Exception] = []


class Checkpoints:
    """The checkpoints of one run. Every process of the run calls every method. A context manager.

    Attributes:
      changes: how the settings differ from those of the checkpoint that was restored.
      best: the step with the smallest validation loss; its checkpoint is kept besides the newest ones.
    """

    def __init__(self, folder: Path, *, keep: int, settings: Settings, accept_changes: bool = False) -> None:
        """Opens `folder`, creating it if it does not exist.

        Args:
          folder: has one folder per checkpoint, named by its step.
          keep: number of newest checkpoints to keep.
          settings: those of the run, the same on every process; saved with every checkpoint.
          accept_changes: whether they may differ from a checkpoint's in how the model learns.
        """
        self.folder = folder.resolve()
        self.changes: list[str] = []
        self.best: Best | None = None
        self._settings, self._accept_changes = settings, accept_changes
        self._failed = False
        _hide_tracebacks_of_orbax()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, lambda: self.best),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def is_complete(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step` and its settings can be read.

        Raises:
          ConfigError: it was written with other settings.
        """
        if self._manager.latest_step() != step:
            return False
        try:
            succeed_on_all(lambda: self._check_settings(step))
        except FailedSomewhere:
            return False  # damaged: `restore` reports it and uses an older one
        return True

    def _check_settings(self, step: int) -> None:
        saved = read_items(self.folder / str(step), config=ocp.args.JsonRestore())["config"]
        self.changes = check_resumable(
            self._settings, saved, where=f"{self.folder}/{step}", accept_changes=self._accept_changes
        )
        self._settings = with_known_digests(self._settings, saved)

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
            data=ocp.args.JsonSave({"position": position, "best": self.best and self.best._asdict()}),
            config=ocp.args.JsonSave(dict(self._settings)),
            checksums=ocp.args.JsonSave(array_checksums(state)),
        )
        with self._disk_errors():
            self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk; raises like `save`."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    def raise_if_failed(self) -> None:
        """Raises like `save` if a checkpoint that is written in the background has failed."""
        with self._disk_errors():
            # Not by `check_for_errors`: the manager's own thread has taken the error by then. With several
            # processes that thread waits for the others, which wait for this one.
            if _background_errors:
                raise _background_errors.pop()
            if not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns the errors of a full or broken disk into a UserError."""
        try:
            yield
        except (OSError, ValueError) as error:
            if (reason := _system_error(error)) is None:
                raise
            self._failed = True
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
          ConfigError: the checkpoint was written with other settings.
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
            self._check_settings(step)
            state = ocp.args.PyTreeRestore(
                item=abstract,  # type: ignore[arg-type]
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            )
            return read_items(
                self.folder / str(step), state=state, data=ocp.args.JsonRestore(),
                checksums=ocp.args.JsonRestore(),
            )  # fmt: skip

        restored = succeed_on_all(read)
        # Checksums of sharded arrays are a collective operation: only once every process has its shards.
        found = array_checksums(restored["state"])
        succeed_on_all(lambda: check_undamaged(found, restored["checksums"]))
        best = restored["data"].get("best")  # absent in checkpoints of earlier versions
        self.best = None if best is None else Best(**best)
        return restored["state"], int(restored["data"]["position"])

    def _move_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints away, so that new ones can take their names."""

        def move() -> None:
            for step in steps if is_first_process() else []:
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

    def close(self) -> None:
        """Waits for checkpoints that are being written; raises like `save`."""
        with self._disk_errors():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Closes. What ends the run goes first: a checkpoint that fails now is only warned of.

        After an error of one of several processes, closing would wait for the others, which still train.
        """
        if error is not None and jax.process_count() > 1:
            return
        said = self._failed
        try:
            self.close()
        except UserError as also:
            if error is None:
                raise
            if not said:
                logger.warning("%s", also)


def read_items(checkpoint: Path, **items: ocp.args.CheckpointArgs) -> Any:
    """Reads items of a checkpoint: of arrays, the shards of this process.

    Not by the manager's own `restore`: it waits for all processes, and forever when one of them cannot read.
    """
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
        return reader.restore(checkpoint, args=ocp.args.Composite(**items))


def _hide_tracebacks_of_orbax() -> None:
    """Hides what a failed write prints from threads, pages long: the main thread raises the error, too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_traceback_of_orbax)
    if getattr(sys.unraisablehook, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if isinstance(error, Exception) and record.threadName == "async_save" and jax.process_count() > 1:
        _background_errors.append(error)
    return error is None or not ("orbax" in record.pathname or "orbax-checkpoint-tmp" in str(error))


def _unraisable(usual: Callable[["sys.UnraisableHookArgs"], object], args: "sys.UnraisableHookArgs") -> None:
    """Ignores writes that end after Orbax has given up on the checkpoint and closed its event loop."""
    if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
        usual(args)


def _system_error(error: Exception) -> str | None:
    """The system's reason for a failed write, or None if the error is another one."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = _ERROR_NUMBER.search(str(error))
    return os.strerror(int(number[1])) if number else None


def _free_name(path: Path) -> Path:
    """`path`, or `path` with the first suffix ".1", ".2", ... that is not taken."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{i}") for i in itertools.count(1)))
    return next(name for name in names if not name.exists())


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
            f"run.out {out}: {free / 1e9:.3f} GB are free; checkpoints and weights need"
            f" {needed / 1e9:.3f} GB: free space there, or lower run.keep_checkpoints"
        )
