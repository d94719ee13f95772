"""Compiler flags for TPUs, put into the environment before jax starts.

None was measured with this model, so they are set on request alone: CROSSLMM_XLA_FLAGS=all. Unset or 0 sets
nothing. libtpu ends the process at a flag that it does not know, so nothing is set for a jaxlib outside those
whose libtpu is known to take them. What the user has set wins.

There are none for GPUs: XLA_FLAGS holds for every program of a process, and what speeds up the encoder
(--xla_gpu_enable_triton_gemm=false) makes decoding three times slower (6.3 -> 19.9 ms a token on one H100).
`compiler_options.py` sets it for the programs that gain by it.

`python -m crosslmm_jax.parallel.xla_flags` prints the variable as a line for a shell, which
`launch/_env.sh` reads it.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
from collections.abc import Mapping, MutableMapping

from crosslmm_jax.errors import UserError

SWITCH = "CROSSLMM_XLA_FLAGS"
VARIABLE = "LIBTPU_INIT_ARGS"
OLDEST, BELOW = (0, 10, 2), (0, 12)  # versions of jaxlib with a libtpu whose strings were read

# Collectives of fsdp beside matmuls.
FLAGS = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)


def apply(environ: MutableMapping[str, str]) -> None:
    """Adds the flags to LIBTPU_INIT_ARGS of `environ` when they are asked for and a TPU is usable.

    Doing so twice is doing so once. A process whose jax has started does not see them.

    Raises:
      UserError: CROSSLMM_XLA_FLAGS is neither 0 nor all.
    """
    switch = environ.get(SWITCH, "")
    if switch not in ("", "0", "all"):
        raise UserError(f"environment variable {SWITCH} is {switch!r}; it must be 0 or all, or not be set")
    if switch != "all" or not _is_usable(environ) or not _is_known(_jaxlib_version()):
        return
    present = environ.get(VARIABLE, "").split()
    theirs = {_name(word) for word in present}
    environ[VARIABLE] = " ".join([*present, *(flag for flag in FLAGS if _name(flag) not in theirs)])


def _is_usable(environ: Mapping[str, str]) -> bool:
    """Whether jax may start a TPU here: not ruled out by JAX_PLATFORMS, and its plugin installed."""
    asked = {name.strip() for name in environ.get("JAX_PLATFORMS", "").split(",")} - {""}
    return (not asked or "tpu" in asked) and importlib.util.find_spec("libtpu") is not None


def _jaxlib_version() -> str:
    try:
        return importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _is_known(version: str) -> bool:
    """Whether `version`, such as 0.11.2 or 0.11.2.dev3, lies within OLDEST and BELOW."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if found is None:
        return False
    numbers = tuple(int(number or 0) for number in found.groups())
    return OLDEST <= numbers < BELOW


def _name(word: str) -> str:
    return word.split("=")[0].removeprefix("--")


def shell_line(environ: Mapping[str, str]) -> str:
    """The line that brings a shell's variable to what `apply` makes of `environ`; "" for no change."""
    changed = dict(environ)
    apply(changed)
    if changed.get(VARIABLE) == environ.get(VARIABLE):
        return ""
    return f"export {VARIABLE}={shlex.quote(changed[VARIABLE])}"


if __name__ == "__main__":
    print(shell_line(os.environ))
