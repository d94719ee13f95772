"""Options of XLA for programs that are made of large matrix products."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def matmul_options() -> dict[str, bool | int] | None:
    """`compiler_options` of `jax.jit` for encoding, prefill and training; None off the GPU.

    Without Triton's products XLA calls cuBLASLt, which adds bias, GELU and residual within the product:
    measured on one H100 (jax 0.11.2, bfloat16, 128 frames through the SigLIP2 encoder), 193 ms against 216.
    Decoding must not use them: its products of one row are three times as fast in Triton.

    Products that read the same input stay apart: merged, Q, K and V take a copy of their weights beside each
    other, and a pass over memory that adds their biases and splits them (by the profiler 62 of 850 us of an
    encoder layer at 16 frames); apart, each adds its own within.
    """
    if jax.default_backend() != "gpu":
        return None
    return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


@functools.cache
def program(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose `model` is static, compiled with these options; the same one at every call.

    Made late, since asking for the platform starts it.
    """
    return jax.jit(function, static_argnames="model", compiler_options=matmul_options())
