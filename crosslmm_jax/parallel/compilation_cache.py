"""Compiled programs on disk: jax's persistent compilation cache, on by default for all that loads a model.

A new process then reads the programs that an earlier one compiled. The folder is crosslmm_jax/programs below
XDG_CACHE_HOME, or below ~/.cache.

| to | set, before the process starts |
|---|---|
| move it | XDG_CACHE_HOME; or JAX_COMPILATION_CACHE_DIR, and all of jax's own settings hold |
| turn it off | JAX_ENABLE_COMPILATION_CACHE=0 |

- What the user has set, in the environment or in `jax.config`, is never changed.
- It needs no care: jax evicts the programs that were used least recently above MAX_BYTES.
- Several processes may share it: with a bound on the size, jax reads and writes under a lock. Without one, a
  process can read what another has half written.
- Training, and several processes that answer together, do not use it unless asked to by
  JAX_COMPILATION_CACHE_DIR: the hosts would wait for one lock, over a network.

Nothing here needs jax until `use` is called.
"""

import logging
import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path

import filelock

logger = logging.getLogger(__name__)

FOLDER = "JAX_COMPILATION_CACHE_DIR"
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
MAX_BYTES = 8 * 2**30  # about a thousand programs of a 2B model on a GPU
MAX_PROGRAMS = 4000  # most are tiny; jax lists all of them whenever it adds one
MAX_AUTOTUNED = 20_000  # fusions that XLA has timed on a GPU, in a folder of its own with a file for each
# Setting -> jax's default, ours. Small programs are kept too: a process runs hundreds of them.
SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": (1.0, 0.0),
    "JAX_COMPILATION_CACHE_MAX_SIZE": (-1, MAX_BYTES),
}
_PROGRAM, _LAST_USE = "-cache", "-atime"  # how the two files of a program end
_LOCK_SECONDS = 10.0


def apply(environ: MutableMapping[str, str]) -> None:
    """Turns the cache on in `environ`, for a process that has not imported jax, and for those it starts.

    Idempotent. A folder that cannot be used is a warning, and nothing is changed.
    """
    switch = environ.get(SWITCH, "1").lower()
    if FOLDER in environ or switch in ("0", "f", "false", "n", "no", "off"):  # as jax reads it
        return
    if environ.get("NUM_PROCESSES", "1") not in ("", "0", "1"):
        return
    if folder := _usable_folder(environ):
        environ[FOLDER] = str(folder)
        for name, (_, value) in SETTINGS.items():
            environ.setdefault(name, str(value))


def use() -> None:
    """The same as `apply`, in a process whose jax may have started."""
    import jax

    config = jax.config
    folder, switch = (getattr(config, name.lower()) for name in (FOLDER, SWITCH))
    if folder is not None or not switch or jax.distributed.is_initialized():
        return
    if folder := _usable_folder(os.environ):
        config.update(FOLDER.lower(), str(folder))
        for name, (default, value) in SETTINGS.items():
            if name not in os.environ and getattr(config, name.lower()) == default:
                config.update(name.lower(), value)


def _usable_folder(environ: Mapping[str, str]) -> Path | None:
    """The folder, made and tidied up; None after a warning."""
    base = environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else Path("~/.cache")
    folder = folder / "crosslmm_jax" / "programs"
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # jax runs what it finds there.
        if folder.stat().st_uid != os.getuid():
            raise PermissionError("it belongs to another user")
        with filelock.FileLock(folder / ".lockfile", timeout=_LOCK_SECONDS):  # jax's own lock
            _tidy(folder)
    except filelock.Timeout:
        return folder  # others use it; the next process tidies up
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home, or no locks
        logger.warning(
            "compiled programs are not kept in %s (%s); set XDG_CACHE_HOME to a folder that can be written",
            folder, error,
        )  # fmt: skip
        return None
    return folder


def _tidy(folder: Path) -> None:
    """Removes what a killed process left half written, and the oldest files above the limits on numbers."""
    programs, used = ({path.name.removesuffix(end): path for path in folder.glob(f"*{end}")}
                      for end in (_PROGRAM, _LAST_USE))  # fmt: skip
    # jax writes the program first. Without the second file it cannot evict anything, and keeps nothing new.
    for key in programs.keys() ^ used.keys():
        (programs.get(key) or used[key]).unlink(missing_ok=True)
    for path in _oldest([used[key] for key in programs.keys() & used.keys()], MAX_PROGRAMS):
        path.unlink(missing_ok=True)
        programs[path.name.removesuffix(_LAST_USE)].unlink(missing_ok=True)
    autotuned = folder / "xla_gpu_per_fusion_autotune_cache_dir"
    for path in _oldest([path for path in autotuned.glob("*") if path.is_file()], MAX_AUTOTUNED):
        path.unlink(missing_ok=True)


def _oldest(paths: Iterable[Path], limit: int) -> list[Path]:
    """Of more than `limit` files, the older ones: all but half of `limit`."""
    paths = list(paths)
    if len(paths) <= limit:
        return []
    return sorted(paths, key=lambda path: path.stat().st_mtime)[: -(limit // 2)]
