"""Fused attention for heads of 72 or 80 columns on Hopper's GPUs, which cuDNN computes as if they had 128.

SigLIP2's heads have 72. On one H200, 32 frames of one encoder layer take cuDNN 0.32 to 0.35 ms, and this 0.20
to 0.23 (docs/results/h200_attention.json). Forward only: where gradients are asked for, cuDNN does both
passes, which share its log-sum-exp. There is no rule for `jax.vmap`.
"""

import functools
import logging
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from crosslmm_jax.model.attention import cudnn
from crosslmm_jax.model.params.partitioning import AxisRules, map_devices, num_shards

logger = logging.getLogger(__name__)

HOPPER = "9.0"  # compute capability; newer GPUs lack the instructions
SMALLEST, LARGEST = 72, 80  # head sizes
FEWEST_QUERIES = 64  # that fill a block
_BUILDING = threading.Lock()  # of kernels: one of each is enough


def is_applicable(
    q: Array, k: Array, kv_start: Any = None, kv_stop: Any = None, *, causal: bool = False,
    rules: AxisRules | None = None, axes: tuple[str, str | None] = ("act_batch", "act_heads"),
) -> bool:  # fmt: skip
    """Whether the kernel takes arguments of `attention`; every query must read the same keys, and be told so.

    Its sizes, too: rows that devices share evenly, and queries that fill a block. On several devices `rules`
    must say how: what the compiler lays out alone, it would gather for a kernel.
    """
    return (
        (rules is not None or jax.sharding.get_abstract_mesh().size <= 1)
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.dtype == k.dtype
        and q.shape[2] == k.shape[2]
        and SMALLEST <= q.shape[-1] <= LARGEST
        and q.shape[-1] % 8 == 0
        and q.shape[1] >= FEWEST_QUERIES
        and q.shape[0] > 0
        and q.shape[0] % num_shards(rules, axes[0]) == 0
        and kv_start is None
        and not causal
        and _keys_read(k, kv_stop) is not None
        and _is_available()
    )


def mosaic_attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], v: Float[Array, "b s n h"], kv_start: Any = None,
    kv_stop: Int[np.ndarray, "b 1"] | Any = None, *, causal: bool = False, rules: AxisRules | None = None,
    axes: tuple[str, str | None] = ("act_batch", "act_heads"),
) -> Float[Array, "b t n h"]:  # fmt: skip
    """Attention of all queries over the first `kv_stop` keys; arguments as of `attention`.

    Each device computes its own rows and heads. What lies behind the keys that are read must be finite: it is
    multiplied by 0.

    Raises:
      ValueError: not `is_applicable`.
    """
    read = _keys_read(k, kv_stop)
    if read is None or not is_applicable(q, k, kv_start, kv_stop, causal=causal, rules=rules, axes=axes):
        raise ValueError(
            "attention backend 'mosaic' needs a Hopper GPU, bfloat16 or float16, heads of 72 or 80 columns,"
            f" as many for keys as for queries, and {FEWEST_QUERIES} queries or more that all read the same"
            " number of keys, on several devices with rules that share rows evenly; got"
            f" {q.dtype}{q.shape} over {k.dtype}{k.shape}; use 'auto'"
        )

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array) -> Array:
        return map_devices(functools.partial(_kernel, read=read), q, k, v, rules=rules, axes=axes)

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        # Made here: from outside, it would belong to the trace of a layer that is long over by now.
        lengths = None if read == k.shape[1] else jnp.full((k.shape[0],), read, jnp.int32)
        return cudnn.fused_forward(q, k, v, lengths, False)

    def backward(residuals: Any, d_out: Array) -> tuple[Array, Array, Array]:
        d_q, d_k, d_v, _ = cudnn.fused_backward(False, residuals, d_out)
        return d_q, d_k, d_v

    attend.defvjp(forward, backward)
    return attend(q, k, v.astype(q.dtype))


def _keys_read(k: Array, kv_stop: Any) -> int | None:
    """How many keys all queries of all rows read, if that is known."""
    read = k.shape[1]
    if kv_stop is not None:
        if not isinstance(kv_stop, np.ndarray) or np.unique(kv_stop).size != 1:
            return None
        read = min(read, int(kv_stop.flat[0]))
    return read if read > 0 else None


def _kernel(q: Array, k: Array, v: Array, *, read: int) -> Array:
    from crosslmm_jax.model.attention import mosaic_kernel  # not with every version of JAX can it be imported

    plan = mosaic_kernel.Plan(
        batch=q.shape[0], queries=q.shape[1], keys=k.shape[1], heads=q.shape[2], size=q.shape[3], read=read,
        dtype=q.dtype.name, blocks=cudnn.multiprocessors(),
    )  # fmt: skip
    with _BUILDING:
        kernel = mosaic_kernel.build(plan)
    return kernel(q, k, v)


def _is_available() -> bool:
    return getattr(jax.local_devices()[0], "compute_capability", None) == HOPPER and _can_be_built()


@functools.cache
def _can_be_built() -> bool:
    """Whether this version of JAX takes the kernel's code: Mosaic GPU is experimental, and may change.

    What only compiling or running finds is not: config.attention="cudnn" is the way out of that.
    """
    try:  # whole blocks of keys, and a last one that is partly read
        sample = jax.ShapeDtypeStruct((1, 200, 1, SMALLEST), jnp.bfloat16)
        function = jax.jit(functools.partial(_kernel, read=129))
        function.trace(sample, sample, sample).lower(lowering_platforms=("cuda",))
    except Exception:
        logger.warning(
            "the encoder's attention kernel does not build with jax %s: cuDNN takes its place, and 128 frames"
            " through SigLIP2 take about 8%% longer", jax.__version__, exc_info=True,
        )  # fmt: skip
        return False
    return True
