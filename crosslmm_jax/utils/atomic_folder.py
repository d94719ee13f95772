"""A folder that is complete or absent: it is made in a hidden one beside it, which outlives a failure."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from crosslmm_jax.errors import UserError

_LOCK = "lock"


@contextlib.contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """The hidden folder in which `target` is made, with what an earlier try left. One process at a time.

    Raises:
        UserError: it cannot be written or replaced, or another process works in it; of an OSError within too.
    """
    if os.path.ismount(target):
        raise UserError(f"--out {target}: a disk is mounted there; name a folder inside it")
    work = target.with_name(f".{target.name}.building")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / _LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"--out {target}: {error.strerror or error}; name a folder that can be written"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{target}: another process is writing it; wait for it") from None
        try:
            yield work
        except OSError as error:
            raise cannot_write(target, error) from error


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error of a file or folder that cannot be written."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split(";")[0]
    fix = "free space there or name another folder; the same command goes on where it stopped"
    return UserError(f"{path}: cannot be written ({words}); {fix}")


def put(work: Path, target: Path) -> None:
    """Moves what is finished to its place; what was there before goes."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(work, target)
    (target / _LOCK).unlink()
    shutil.rmtree(old, ignore_errors=True)
