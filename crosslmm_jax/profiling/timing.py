"""Times of synchronised calls after a warm-up, repeated, with the raw samples kept; and rates of the device.

The rates, of a large matrix product and of memory, are measured in the same process and on random data: on
zeros a GPU draws less power and runs faster.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from crosslmm_jax.profiling.inputs import random_array
from crosslmm_jax.profiling.record import Row

IN_A_ROW = 10  # calls between two clock reads, for short calls
LONG_MS = 5_000  # a call that takes longer is neither warmed up nor repeated
# Variables that change how XLA compiles and how it takes memory.
VARIABLES = (
    "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR",
)  # fmt: skip


class Timing(TypedDict):
    """Milliseconds of one call."""

    ms: float  # median
    ms_min: float
    ms_max: float
    samples_ms: list[float]


def measure(
    call: Callable[[PyTree], PyTree],
    *,
    repeats: int,
    warmup: int = 2,
    prepare: Callable[[], PyTree] | None = None,
    wait: Callable[[PyTree], PyTree] = jax.block_until_ready,
) -> Timing:
    """Wall-clock time of `call`, until `wait` has seen its result finished.

    If the first call takes more than LONG_MS, it is the only one, and counts.

    Args:
      call: what to time; its result is dropped before the next call, so that it holds no memory.
      repeats: calls that count.
      warmup: calls before them that do not count.
      prepare: makes the argument of `call` (None without it), outside the clock.
      wait: blocks until a result is there.
    """
    samples = []
    for _ in range(warmup + repeats):
        prepared = None if prepare is None else wait(prepare())
        begin = time.perf_counter()
        result = wait(call(prepared))
        samples.append(1e3 * (time.perf_counter() - begin))
        del result, prepared
        if len(samples) == 1 and samples[0] > LONG_MS:
            return summary(samples)
    return summary(samples[warmup:])


def summary(samples_ms: list[float]) -> Timing:
    """Median and extremes of the samples."""
    return {
        "ms": statistics.median(samples_ms),
        "ms_min": min(samples_ms),
        "ms_max": max(samples_ms),
        "samples_ms": [round(sample, 4) for sample in samples_ms],
    }


def measure_many(
    call: Callable[[], PyTree], *, repeats: int, wait: Callable[[PyTree], PyTree] = jax.block_until_ready
) -> Timing:
    """As `measure`, for short calls: each sample is the mean of IN_A_ROW calls launched in a row."""

    def several(_: None) -> PyTree:
        for _i in range(IN_A_ROW - 1):
            call()
        return call()

    timed = measure(several, repeats=repeats, wait=wait)
    return summary([sample / IN_A_ROW for sample in timed["samples_ms"]])


def device_facts() -> Row:
    """The device, the variables of its environment, and the rate of a matrix product on it."""
    rate, device = matmul_rate(), jax.devices()[0]
    return {
        "environment": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "device": device.device_kind,
        "platform": f"jax {device.platform}",
        "matmul_tflops": rate["matmul_tflops"],
        "matmul": rate,
    }


def matmul_rate(*, repeats: int = 7) -> Row:
    """Rate of a bfloat16 matrix product of size 8192 (512 off GPU and TPU), in TFLOP/s."""
    size = 8192 if jax.default_backend() in ("gpu", "tpu") else 512
    a, b = (random_array((size, size), jnp.bfloat16, seed=seed, std=1.0) for seed in (1, 2))
    timed = measure_many(functools.partial(jax.jit(jnp.matmul), a, b), repeats=repeats)
    return {"matmul_tflops": 2e-9 * size**3 / timed["ms"], "size": size, **timed}


def memory_facts(*, repeats: int = 7) -> Row:
    """Rate at which the device's memory is read or written, in TB/s: the fastest of three ways.

    Reading alone, a plain copy, and a kernel that reads and writes. No single one is the fastest everywhere,
    and times are compared with the time to read memory once: a rate below the best would flatter them.
    """
    size = 2**29 if jax.default_backend() in ("gpu", "tpu") else 2**22
    array = random_array((64, size // 64), jnp.bfloat16, seed=3)
    passes = {
        "sum": (jax.jit(lambda x: jnp.sum(x, axis=1, dtype=jnp.float32)), 1),
        "copy": (jax.jit(jnp.copy), 2),
        "negate": (jax.jit(jnp.negative), 2),
    }
    ways = {}
    for name, (call, count) in passes.items():
        timed = measure_many(functools.partial(call, array), repeats=repeats)
        ways[name] = {"tb_per_s": 1e-9 * count * array.nbytes / timed["ms"], **timed}
    fastest = max(way["tb_per_s"] for way in ways.values())
    return {
        "memory_tb_per_s": fastest,
        "memory": {"memory_tb_per_s": fastest, "bytes": array.nbytes, "ways": ways},
    }
