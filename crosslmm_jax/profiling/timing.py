"""Times that mean what they say: warmed up, synchronised, repeated, raw samples kept.

The rates of the machine itself, a large matrix product and its memory, are measured in the same process
and on random data: on zeros a GPU draws less power and runs faster.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp

from crosslmm_jax.profiling.inputs import random_array

IN_A_ROW = 10  # launches between two clock reads, where one is short
LONG_MS = 5_000  # a call that takes longer is neither warmed up nor repeated


class Timing(TypedDict):
    """Milliseconds of one call."""

    ms: float  # median
    ms_min: float
    ms_max: float
    samples_ms: list[float]


def measure(
    call: Callable[[Any], Any],
    *,
    repeats: int,
    warmup: int = 2,
    prepare: Callable[[], Any] | None = None,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Timing:
    """Wall-clock time of `call`, from the call until `wait` has seen its result finished.

    If the first call takes more than LONG_MS, it is the only one, and counts.

    Args:
      call: what to time; its result is dropped before the next call, so that it holds no memory.
      prepare: makes what `call` is given (None without it), outside the clock.
      repeats: calls that count.
      warmup: calls before that do not.
      wait: blocks until a result is there.
    """
    samples = []
    for _ in range(warmup + repeats):
        given = None if prepare is None else wait(prepare())
        begin = time.perf_counter()
        result = wait(call(given))
        samples.append(1e3 * (time.perf_counter() - begin))
        del result, given
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


def measure_many(call: Callable[[], Any], *, repeats: int, count: int = IN_A_ROW) -> Timing:
    """As `measure`, for short calls: each sample is the mean of `count` calls launched in a row."""

    def several(_: Any) -> Any:
        result: Any = None
        for _ in range(count):
            result = call()
        return result

    return summary([sample / count for sample in measure(several, repeats=repeats)["samples_ms"]])


def matmul_rate(*, repeats: int = 7) -> dict[str, Any]:
    """Rate of a bfloat16 matrix product with 8192 in each dimension (512 off the GPU or TPU), in TFLOP/s."""
    size = 8192 if jax.default_backend() in ("gpu", "tpu") else 512
    a, b = (random_array((size, size), jnp.bfloat16, seed=seed, std=1.0) for seed in (1, 2))
    product = jax.jit(jnp.matmul)
    timing = measure_many(lambda: product(a, b), repeats=repeats)
    return {"matmul_tflops": 2e-9 * size**3 / timing["ms"], "size": size, **timing}


def memory_rate(*, repeats: int = 7) -> dict[str, Any]:
    """Rate at which the device's memory is read or written, in TB/s: the fastest of three ways.

    Reading alone, a plain copy, and a kernel that reads and writes: no single one is the fastest everywhere,
    and a time to read memory once that can be beaten would flatter what is held against it.
    """
    size = 2**29 if jax.default_backend() in ("gpu", "tpu") else 2**22
    source = random_array((64, size // 64), jnp.bfloat16, seed=3)
    ways = {
        "sum": (jax.jit(lambda x: jnp.sum(x, axis=1, dtype=jnp.float32)), 1),
        "copy": (jax.jit(jnp.copy), 2),
        "negate": (jax.jit(jnp.negative), 2),
    }
    rates = {}
    for name, (call, passes) in ways.items():
        timing = measure_many(functools.partial(call, source), repeats=repeats)
        rates[name] = {"tb_per_s": 1e-9 * passes * source.nbytes / timing["ms"], **timing}
    return {
        "memory_tb_per_s": max(rate["tb_per_s"] for rate in rates.values()),
        "bytes": source.nbytes,
        "ways": rates,
    }
