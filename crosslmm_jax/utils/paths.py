"""What may be wrong with a path that a user gave, for messages."""

import difflib
import os
import re
import shlex
from pathlib import Path

from crosslmm_jax.config import is_remote
from crosslmm_jax.errors import UserError

_LFS = b"version https://git-lfs.github.com/spec/"


def check_local(path: str | os.PathLike[str]) -> None:
    """Raises a `UserError` for a path in an object store, of which a `Path` makes a folder named "gs:"."""
    if is_remote(path):
        written = re.sub(
            r"^([^/]+:)/(?!/)", r"\1//", os.fspath(path)
        )  # as the user wrote it, not as a `Path`
        raise UserError(f"{written}: object stores are not supported yet; name a folder of a mounted disk")


def guess_meant(path: str | os.PathLike[str]) -> str:
    """A hint about a path that does not exist: "; did you mean X?", or "" without a guess.

    The first part that does not exist is compared with what is there.
    """
    if is_remote(path):
        return "; only files of a mounted disk are read: copy it to one"
    missing = Path(os.path.normpath(path))
    while missing.parent != missing and not missing.parent.exists():
        missing = missing.parent
    try:
        beside = os.listdir(missing.parent)
    except OSError:
        return ""
    names = {name.lower(): name for name in beside}
    close = difflib.get_close_matches(missing.name.lower(), names, n=1, cutoff=0.7)
    return f"; did you mean {missing.parent / names[close[0]]}?" if close else ""


def cannot_read(path: str | os.PathLike[str], reason: str) -> UserError:
    """The error for a file that cannot be read: `reason`, unless it is only Git LFS's pointer to the file."""
    if is_lfs_pointer(path):
        folder = os.path.dirname(os.path.abspath(path))
        reason = (
            f"is Git LFS's pointer to the file, not the file; run `git -C {shlex.quote(folder)} lfs pull`"
        )
    return UserError(f"{path}: {reason}")


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether Git LFS has left a pointer in place of the file."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_LFS)) == _LFS
    except OSError:
        return False
