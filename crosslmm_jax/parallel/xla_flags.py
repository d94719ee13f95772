"""Compiler flags for TPUs, added to the environment before jax starts.

- None was measured with this model, so they are set only on request: CROSSLMM_XLA_FLAGS=all. Unset or 0 sets
  nothing.
- libtpu ends the process at an unknown flag, so nothing is set unless the libtpu of this jaxlib is known to
  take them.
- Flags that the user has set are kept.
- GPUs get none: XLA_FLAGS hold for every program of a process. The flag that makes the encoder faster
  (--xla_gpu_enable_triton_gemm=false) makes decoding three times slower (6.3 -> 19.9 ms per token on one
  H100). `compiler_options.py` sets it for single programs.

`python -m crosslmm_jax.parallel.xla_flags` prints a shell line that sets the variable, for `launch/_env.sh`.
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
OLDEST, BELOW = (0, 10, 2), (0, 12)  # jaxlib versions whose libtpu was searched for these flags

# They overlap the collectives of fsdp with matrix products.
FLAGS = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)


def apply(environ: MutableMapping[str, str]) -> None:
    """Adds the flags to LIBTPU_INIT_ARGS of `environ` if they are requested and a TPU is usable.

    Idempotent. Without effect on a process whose jax has started.

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
    """Whether jax may start a TPU: JAX_PLATFORMS allows it and its plugin is installed."""
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
    """The line that makes a shell set its variable as `apply` does; "" for no change."""
    changed = dict(environ)
    apply(changed)
    if changed.get(VARIABLE) == environ.get(VARIABLE):
        return ""
    return f"export {VARIABLE}={shlex.quote(changed[VARIABLE])}"


if __name__ == "__main__":
    print(shell_line(os.environ))
