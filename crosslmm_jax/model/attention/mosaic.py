"""Fused attention for heads of 72 or 80 columns on Hopper GPUs. cuDNN computes these as if they had 128.

SigLIP2's heads have 72. On one H200, 32 frames of one encoder layer take 0.20 to 0.23 ms instead of cuDNN's
0.32 to 0.35 (docs/results/h200_attention.json). The kernel has no backward pass: with gradients, cuDNN runs
both passes, since the backward pass reads the log-sum-exp of its own forward pass. `jax.vmap` is not
supported.
"""

import functools
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from crosslmm_jax.model.attention import cudnn
from crosslmm_jax.model.params.partitioning import AxisRules, map_devices, num_shards

logger = logging.getLogger(__name__)

HOPPER = "9.0"  # compute capability; newer GPUs lack the instructions
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 72, 80
MIN_QUERIES = 64  # a warpgroup's
_BUILD_LOCK = threading.Lock()  # so that threads do not build the same kernel twice

KVStop = Array | np.ndarray | None


def is_applicable(
    q: Array, k: Array, kv_start: Array | None = None, kv_stop: KVStop = None, *, causal: bool = False,
    rules: AxisRules | None = None, axes: tuple[str, str | None] = ("act_batch", "act_heads"),
) -> bool:  # fmt: skip
    """Whether the kernel takes these arguments of `attention`.

    - All queries read the same keys, and their number is known at compile time.
    - Heads are not grouped, and the queries fill a block.
    - On several devices, `rules` shard the rows evenly. Without rules, XLA would gather them for the kernel.
    """
    return (
        (rules is not None or jax.sharding.get_abstract_mesh().size <= 1)
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.dtype == k.dtype
        and q.shape[2] == k.shape[2]
        and MIN_HEAD_SIZE <= q.shape[-1] <= MAX_HEAD_SIZE
        and q.shape[-1] % 8 == 0
        and q.shape[1] >= MIN_QUERIES
        and q.shape[0] > 0
        and q.shape[0] % num_shards(rules, axes[0]) == 0
        and kv_start is None
        and not causal
        and _num_keys_read(k, kv_stop) is not None
        and _is_available()
    )


def mosaic_attention(
    q: Float[Array, "b t n h"], k: Float[Array, "b s n h"], v: Float[Array, "b s n h"],
    kv_start: Array | None = None, kv_stop: KVStop = None, *, causal: bool = False,
    rules: AxisRules | None = None, axes: tuple[str, str | None] = ("act_batch", "act_heads"),
) -> Float[Array, "b t n h"]:  # fmt: skip
    """Attention of all queries over the first `kv_stop` keys; arguments as of `attention`.

    Each device computes its own rows and heads. Keys and values beyond `kv_stop` must be finite: they are
    multiplied by 0.

    Raises:
      ValueError: not `is_applicable`.
    """
    read = _num_keys_read(k, kv_stop)
    if read is None or not is_applicable(q, k, kv_start, kv_stop, causal=causal, rules=rules, axes=axes):
        raise ValueError(
            "attention backend 'mosaic' needs a Hopper GPU, bfloat16 or float16, heads of 72 or 80 columns,"
            f" as many key heads as query heads, at least {MIN_QUERIES} queries that all read the same number"
            " of keys, and on several devices rules that shard the rows evenly; got"
            f" {q.dtype}{q.shape} over {k.dtype}{k.shape}; use 'auto'"
        )

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array) -> Array:
        return map_devices(functools.partial(_kernel, read=read), q, k, v, rules=rules, axes=axes)

    def forward(q: Array, k: Array, v: Array) -> tuple[Array, cudnn.Backward]:
        # Made within the rule: made outside, it would belong to the trace of a layer, which has ended by now.
        lengths = None if read == k.shape[1] else jnp.full((k.shape[0],), read, jnp.int32)
        return cudnn.fused_forward(q, k, v, lengths, False)

    def backward(residuals: cudnn.Backward, d_out: Array) -> tuple[Array, Array, Array]:
        d_q, d_k, d_v, _ = cudnn.fused_backward(False, residuals, d_out)
        return d_q, d_k, d_v

    attend.defvjp(forward, backward)
    return attend(q, k, v.astype(q.dtype))


def _num_keys_read(k: Array, kv_stop: KVStop) -> int | None:
    """Number of keys that every query of every row reads; None if it is not known or not the same."""
    read = k.shape[1]
    if kv_stop is not None:
        if not isinstance(kv_stop, np.ndarray) or np.unique(kv_stop).size != 1:
            return None
        read = min(read, int(kv_stop.flat[0]))
    return read if read > 0 else None


def _kernel(q: Array, k: Array, v: Array, *, read: int) -> Array:
    from crosslmm_jax.model.attention import mosaic_kernel  # not every JAX version can import it

    shape = mosaic_kernel.KernelShape(
        batch=q.shape[0], queries=q.shape[1], keys=k.shape[1], heads=q.shape[2], size=q.shape[3], read=read,
        dtype=q.dtype.name, blocks=cudnn.multiprocessors(),
    )  # fmt: skip
    with _BUILD_LOCK:
        kernel = mosaic_kernel.build(shape)
    return kernel(q, k, v)


def _is_available() -> bool:
    return getattr(jax.local_devices()[0], "compute_capability", None) == HOPPER and _can_be_built()


@functools.cache
def _can_be_built() -> bool:
    """Whether the kernel lowers with this version of JAX: Mosaic GPU is experimental and may change.

    Errors of compiling or running it are not found here. Against these, set config.attention="cudnn".
    """
    try:  # one whole block of keys, and a last one that is partly read
        sample = jax.ShapeDtypeStruct((1, 200, 1, MIN_HEAD_SIZE), jnp.bfloat16)
        function = jax.jit(functools.partial(_kernel, read=129))
        function.trace(sample, sample, sample).lower(lowering_platforms=("cuda",))
    except Exception:
        logger.warning(
            "the encoder's attention kernel does not build with jax %s; cuDNN is used instead, and encoding"
            " 128 frames with SigLIP2 takes about 8%% longer", jax.__version__, exc_info=True,
        )  # fmt: skip
        return False
    return True
