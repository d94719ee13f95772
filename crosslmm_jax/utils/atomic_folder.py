"""Files and folders that are complete or absent: made under a hidden name beside the target, then renamed.

.NAME.building    the folder, or the file, that is being made
.NAME.lock        held by the process that makes the folder
.NAME.old         the folder that was there before, while it is replaced
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from crosslmm_jax.errors import UserError
from crosslmm_jax.utils.paths import check_local


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, resume: bool) -> Iterator[Path]:
    """A hidden folder to fill, which replaces `target` when the block ends without an error.

    Args:
        target: the final name. A symbolic link stays one: the folder that it points to is replaced.
        resume: True keeps the contents after an error or a kill, for the next call to continue with.
            False starts with an empty folder and deletes it after an error.

    Raises:
        UserError: `target` cannot be written, is a mount point or in an object store, or another process is
            writing it. An OSError inside the block becomes one too.
    """
    check_local(target)
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):
        raise UserError(f"{target}: a disk is mounted there; name a folder inside it")
    building = _hidden(target, "building")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if not resume:
                shutil.rmtree(building, ignore_errors=True)
            try:
                building.mkdir(exist_ok=True)
                yield building
                if resume:
                    (building / "lock").unlink(missing_ok=True)  # of earlier versions, which locked it there
                _replace(target, building)
            finally:
                if not resume:
                    shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise cannot_write(target, error, resume=resume) from error


def atomic_write(path: Path, content: bytes) -> None:
    """Writes a file that is never there half-written."""
    building = _hidden(path, "building")
    try:
        building.write_bytes(content)
        os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def is_vacant(folder: Path) -> bool:
    """Whether nothing would be lost if `folder` was replaced: it is absent or empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def cannot_write(path: Path, error: Exception, *, resume: bool) -> UserError:
    """The error for a file or folder that cannot be written; `resume` as for `atomic_folder`."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split(";")[0]
    fix = "name another folder"
    code = error.errno if isinstance(error, OSError) else None
    if code in (None, errno.ENOSPC, errno.EDQUOT):
        fix = f"free space there or {fix}"
    if resume:
        fix += "; the same command resumes"
    return UserError(f"{path}: cannot be written ({reason}); {fix}")


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Raises a `UserError` when another process is in this block for the same `target`.

    The lock file is beside the folder, because everything inside the folder is replaced.
    """
    path = _hidden(target, "lock")
    with contextlib.ExitStack() as stack:
        locked = False
        while not locked:
            lock = stack.enter_context(open(path, "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{target}: another process is writing it; wait for it") from None
            # The process that held the lock a moment ago may have deleted the file that was opened.
            with contextlib.suppress(FileNotFoundError):
                locked = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _replace(target: Path, complete: Path) -> None:
    """Renames `complete` to `target`. What was there comes back if that fails, else it is deleted."""
    old = _hidden(target, "old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    try:
        os.rename(complete, target)
    except OSError:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
