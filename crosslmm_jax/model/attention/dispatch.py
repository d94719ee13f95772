"""One attention function, several backends, one kind of mask: each query reads a range of keys.

A range a query says all that this model needs: everything (encoder), up to itself (decoder), the frames of
its own and earlier media (cross-attention), the frames around its own (V2V in a window). It costs two
integers a query where a mask would cost T x S.
"""

import logging
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import AttentionBackend
from crosslmm_jax.model.attention import cudnn, mosaic, splash
from crosslmm_jax.model.attention.blockwise import MASKED, block_sizes, blockwise_attention
from crosslmm_jax.model.params.partitioning import AxisRules, map_devices

logger = logging.getLogger(__name__)

Backend = AttentionBackend | Literal["mosaic"]  # which is no choice for a model: its decoder cannot take it

# Scores up to this size are simply held on a CPU or TPU: several times faster to run and to compile.
SMALL_SCORE_BYTES = 32 * 2**20
# Up to this many queries, reading keys once is all the work of a GPU or TPU: two plain products and a softmax
# over scores of up to this many bytes.
DECODE_QUERIES, DECODE_SCORE_BYTES = 8, 2**30
# From this size of keys and values on, cuDNN in parts is faster than these on a GPU. On one H200, a query
# over 256 frames: 0.068 instead of 0.099 ms (2B, 191 MB), 0.114 instead of 0.149 (7B, 382 MB); over 32 frames
# of 7B (48 MB) 0.06 both.
FUSED_DECODE_BYTES = 2**26
SUM_PARTS = 64


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    causal: bool = False,
    kv_start: Int[Array, "b t"] | None = None,
    kv_stop: Int[Array, "b t"] | Int[Array, "b 1"] | Int[np.ndarray, "b 1"] | None = None,
    backend: Backend = "auto",
    rules: AxisRules | None = None,
    axes: tuple[str, str | None] = ("act_batch", "act_heads"),
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped heads; a query that may read no key gets exactly 0.

    Args:
      q: float[B, T, N, H], queries.
      k: float[B, S, K, H], keys; query head n reads key head n // (N / K). May be 8-bit numbers, whose
        scales are the caller's: they become as wide as queries when they are read, by `blockwise` in parts.
      v: float[B, S, K, H], values; likewise.
      causal: query t reads keys 0..t (T = S). Excludes `kv_start` and `kv_stop`.
      kv_start: int32[B, T], first key a query reads (default 0).
      kv_stop: int32[B, T], one past the last key a query reads (default S); [B, 1] for all queries of a row,
        by numpy if it is known.
      backend: "auto" takes `mosaic` on a GPU where it applies, else cuDNN where that does, splash on a TPU,
        `plain` on both for up to 8 queries (but for very many keys); `blockwise` for many keys, `reference`
        elsewhere.
      rules: logical axes, for the backends that the compiler cannot spread over devices: splash and mosaic.
        None, one device: only there "auto" takes cuDNN for up to 8 queries.
      axes: logical axes of the batch and of the heads.

    Returns:
      float[B, T, N, H] in the dtype of `q`. Scores and sums are float32 in every backend.

    Raises:
      ValueError: `causal` together with ranges, or with T != S; "cudnn", "mosaic" or "splash" where it does
        not apply.
    """
    if causal and (kv_start is not None or kv_stop is not None or q.shape[1] != k.shape[1]):
        raise ValueError("causal attention takes as many keys as queries, and no ranges")
    chosen = _choose(backend, q, k, kv_start, kv_stop, rules, causal=causal, axes=axes)
    logger.debug("attention of %s over %s keys: %s", q.shape, k.shape[1], chosen)
    if chosen == "mosaic":
        return mosaic.mosaic_attention(q, k, v, kv_start, kv_stop, causal=causal, rules=rules, axes=axes)
    if chosen in ("cudnn", "splash"):
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    if chosen == "cudnn":
        return cudnn.cudnn_attention(q, k, v, causal=causal, kv_stop=kv_stop)
    kv_stop = None if kv_stop is None else jnp.broadcast_to(kv_stop, q.shape[:2])
    if chosen == "splash":
        stop = _ranges(q, k, causal=True, kv_start=None, kv_stop=None)[1] if causal else kv_stop
        return map_devices(splash.splash_attention, q, k, v, kv_start, stop, rules=rules, axes=axes)
    start, stop = _ranges(q, k, causal=causal, kv_start=kv_start, kv_stop=kv_stop)
    if chosen == "reference":
        return reference_attention(q, k, v, start, stop)
    if chosen == "plain":
        return plain_attention(q, k, v, start, stop)
    return blockwise_attention(q, k, v, start, stop, q.shape[-1] ** -0.5, block_sizes(q))[0]


def _choose(
    backend: Backend, q: Array, k: Array, kv_start: Array | None, kv_stop: Any = None,
    rules: AxisRules | None = None, *, causal: bool = False,
    axes: tuple[str, str | None] = ("act_batch", "act_heads"),
) -> Backend:  # fmt: skip
    applies = cudnn.is_applicable(q) and kv_start is None
    if backend == "cudnn" and not applies:
        raise ValueError(
            "attention backend 'cudnn' needs bfloat16 or float16, a head size divisible by 8 and no kv_start;"
            f" got {q.dtype}, head size {q.shape[-1]}; use 'auto' or 'blockwise'"
        )
    if backend == "splash":
        splash.check(k.shape[1], kv_start)
    if backend != "auto":
        return backend
    platform = jax.default_backend()
    batch, length, heads, _ = q.shape
    score_bytes = batch * length * heads * k.shape[1] * 4
    if platform in ("gpu", "tpu") and length <= DECODE_QUERIES:
        if platform == "gpu" and applies and rules is None and _is_long_decode(q, k, kv_stop):
            return "cudnn"
        if score_bytes <= DECODE_SCORE_BYTES:
            return "plain"
    if platform != "gpu" and score_bytes <= SMALL_SCORE_BYTES:
        return "reference"
    if platform == "tpu":
        return "splash" if splash.is_worthwhile(q, k, kv_start) else "blockwise"
    if platform == "gpu" and applies:
        takes = mosaic.is_applicable(q, k, kv_start, kv_stop, causal=causal, rules=rules, axes=axes)
        return "mosaic" if takes else "cudnn"
    return "blockwise"


def _is_long_decode(q: Array, k: Array, kv_stop: Any) -> bool:
    """Whether keys and values of a row are as many as cuDNN reads faster, as they lie: odd ones it copies."""
    alike = kv_stop is None or kv_stop.shape[1] == 1
    row_bytes = 2 * k.size // k.shape[0] * k.dtype.itemsize
    return alike and k.dtype == q.dtype and k.shape[1] % 2 == 0 and row_bytes >= FUSED_DECODE_BYTES


def _ranges(
    q: Array, k: Array, *, causal: bool, kv_start: Array | None, kv_stop: Array | None
) -> tuple[Array, Array]:
    """The range of keys of every query, spelled out."""
    shape = q.shape[:2]
    if causal:
        kv_stop = jnp.broadcast_to(jnp.arange(1, shape[1] + 1, dtype=jnp.int32), shape)
    if kv_start is None:
        kv_start = jnp.zeros(shape, jnp.int32)
    if kv_stop is None:
        kv_stop = jnp.full(shape, k.shape[1], jnp.int32)
    return kv_start, kv_stop


def reference_attention(
    q: Array, k: Array, v: Array, kv_start: Array, kv_stop: Array
) -> Float[Array, "b t n h"]:
    """The definition, in float32, every score held at once: what the other backends are tested against."""
    batch, length, heads, size = q.shape
    q32 = q.astype(jnp.float32).reshape(batch, length, k.shape[2], -1, size)
    scores = jnp.einsum("btkgh,bskh->bkgts", q32, k.astype(jnp.float32), precision="highest") * size**-0.5
    positions = jnp.arange(k.shape[1])
    visible = (positions >= kv_start[:, :, None]) & (positions < kv_stop[:, :, None])
    visible = visible[:, None, None]
    probabilities = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)
    probabilities = jnp.where(visible, probabilities, 0.0)
    out = jnp.einsum("bkgts,bskh->btkgh", probabilities, v.astype(jnp.float32), precision="highest")
    return out.reshape(q.shape).astype(q.dtype)


def plain_attention(q: Array, k: Array, v: Array, kv_start: Array, kv_stop: Array) -> Float[Array, "b t n h"]:
    """Products in the inputs' dtype, every score held in float32: for a few queries, as in decoding.

    All queries of a row meet the keys of all heads in one product, [T*N, K*H] by [K*H, S]: a query is zero
    outside its own head's columns, and of its values only those of its own head are kept. That multiplies
    more, but reads keys and values once and where they lie; by head, XLA first copies them in another order.
    """
    if k.dtype != q.dtype:
        # 8-bit keys are the same for all generated tokens: not tied to a query, they would be made wide once
        # and for all before the first, and then read at that width.
        q, k, v = jax.lax.optimization_barrier((q, k, v))
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    batch, length, heads, size = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    own = jnp.repeat(jnp.eye(kv_heads, dtype=q.dtype), heads // kv_heads, axis=0)  # [N, K]
    wide = jnp.einsum("btnh,nk->btnkh", q, own).reshape(batch, length * heads, kv_heads * size)
    scores = jnp.einsum(
        "bqw,bsw->bqs", wide, k.reshape(batch, keys, -1), preferred_element_type=jnp.float32
    ).reshape(batch, length, heads, keys)
    positions = jnp.arange(keys)
    visible = ((positions >= kv_start[:, :, None]) & (positions < kv_stop[:, :, None]))[:, :, None]
    scores = jnp.where(visible, scores * size**-0.5, MASKED)
    p = jnp.where(visible, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total > 0, total, 1.0)
    # Many keys are summed in parts: a GPU would otherwise pad, and so copy, all values to split them itself.
    parts = math.gcd(keys, SUM_PARTS)
    p = p.astype(v.dtype).reshape(batch, length * heads, parts, -1)
    v = v.reshape(batch, parts, keys // parts, -1)
    out = jnp.sum(jnp.einsum("bqcs,bcsw->bcqw", p, v, preferred_element_type=jnp.float32), axis=1)
    out = out.reshape(batch, length, heads, kv_heads, size)
    return jnp.einsum("btnkh,nk->btnh", out, own.astype(jnp.float32)).astype(q.dtype)
