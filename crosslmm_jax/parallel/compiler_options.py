"""XLA options for programs of large matrix products."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax

R = TypeVar("R")


def matmul_options() -> dict[str, bool | int] | None:
    """`compiler_options` of `jax.jit` for encoding, prefill and training; None on other devices than GPUs.

    - No Triton products: XLA then calls cuBLASLt, which adds bias, GELU and residual within the product. On
      one H100 (jax 0.11.2, bfloat16), 128 frames take 193 ms in the SigLIP2 encoder instead of 216. Decoding
      must not use this option: its products of one row are three times as fast in Triton.
    - No merged products of the same input. Merged, Q, K and V need a copy of their weights side by side, and
      a pass over memory that adds the biases and splits the result (by the profiler 62 of 850 us of an
      encoder layer at 16 frames). Separate, each product adds its bias itself.
    """
    if jax.default_backend() != "gpu":
        return None
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


@functools.cache
def program(function: Callable[..., R], *static: str) -> Callable[..., R]:
    """`function` under `jax.jit` with these options and a static `model`; the same one at every call.

    `static` names further static arguments.

    Called late, not at import, since `matmul_options` initialises the platform.
    """
    return jax.jit(function, static_argnames=("model", *static), compiler_options=matmul_options())
