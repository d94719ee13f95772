"""One attention function, several backends, one kind of mask: each query reads a range of keys.

A range a query says all that this model needs: everything (encoder), up to itself (decoder), the frames of
its own and earlier media (cross-attention), the frames around its own (V2V in a window). It costs two
integers a query where a mask would cost T x S.
"""

import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import AttentionBackend
from crosslmm_jax.model.blockwise import MASKED, BlockSizes, blockwise_attention

logger = logging.getLogger(__name__)

# Without a GPU, scores up to this size are simply held: several times faster to run and to compile.
SMALL_SCORE_BYTES = 32 * 2**20
# A GPU is idle on small blocks: there, scores of one block may take this many bytes.
GPU_SCORE_BYTES = 64 * 2**20
# Up to this many queries over many keys, cuDNN leaves most of a GPU idle: it splits work by queries only.
FEW_QUERIES, MANY_KEYS = 128, 8192


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    causal: bool = False,
    kv_start: Int[Array, "b t"] | None = None,
    kv_stop: Int[Array, "b t"] | None = None,
    backend: AttentionBackend = "auto",
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped heads; a query that may read no key gets exactly 0.

    Args:
      q: float[B, T, N, H], queries.
      k: float[B, S, K, H], keys; query head n reads key head n // (N / K).
      v: float[B, S, K, H], values.
      causal: query t reads keys 0..t (T = S). Excludes `kv_start` and `kv_stop`.
      kv_start: int32[B, T], first key a query reads (default 0).
      kv_stop: int32[B, T], one past the last key a query reads (default S).
      backend: "auto" takes cuDNN on a GPU where it applies, `blockwise` for many keys, and
        `reference` elsewhere.

    Returns:
      float[B, T, N, H] in the dtype of `q`. Scores and sums are float32 in every backend.

    Raises:
      ValueError: `causal` together with ranges, or with T != S; or "cudnn" where cuDNN does not apply.
    """
    if causal and (kv_start is not None or kv_stop is not None or q.shape[1] != k.shape[1]):
        raise ValueError("causal attention takes as many keys as queries, and no ranges")
    chosen = _choose(backend, q, k, kv_start)
    logger.debug("attention of %s over %s keys: %s", q.shape, k.shape[1], chosen)
    if chosen == "cudnn":
        return _cudnn(q, k, v, causal=causal, kv_stop=kv_stop)
    start, stop = _ranges(q, k, causal=causal, kv_start=kv_start, kv_stop=kv_stop)
    if chosen == "reference":
        return reference_attention(q, k, v, start, stop)
    return blockwise_attention(q, k, v, start, stop, q.shape[-1] ** -0.5, _block_sizes(q))[0]


def _block_sizes(q: Array) -> BlockSizes:
    """The default blocks, or on a GPU blocks of keys that grow as queries get fewer."""
    if jax.default_backend() != "gpu":
        return BlockSizes()
    batch, length, heads, _ = q.shape
    query = min(length, BlockSizes().query)
    key = GPU_SCORE_BYTES // (4 * batch * heads * query) // 1024 * 1024
    return BlockSizes(query, max(1024, key))


def _choose(backend: AttentionBackend, q: Array, k: Array, kv_start: Array | None) -> AttentionBackend:
    applies = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and kv_start is None
    if backend == "cudnn" and not applies:
        raise ValueError(
            "attention backend 'cudnn' needs bfloat16 or float16, a head size divisible by 8 and no kv_start;"
            f" got {q.dtype}, head size {q.shape[-1]}; use 'auto' or 'blockwise'"
        )
    if backend != "auto":
        return backend
    starved = q.shape[1] <= FEW_QUERIES and k.shape[1] >= MANY_KEYS
    on_gpu = jax.default_backend() == "gpu"
    batch, length, heads, _ = q.shape
    if not on_gpu and batch * length * heads * k.shape[1] * 4 <= SMALL_SCORE_BYTES:
        return "reference"
    return "cudnn" if on_gpu and applies and not starved else "blockwise"


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


def _cudnn(q: Array, k: Array, v: Array, *, causal: bool, kv_stop: Array | None) -> Float[Array, "b t n h"]:
    """cuDNN's fused attention. It knows one length a row, not one a query.

    Rows in which every query reads either nothing or the same keys (one medium in the row, the common case)
    run on it; others run blockwise. Which it is, is decided on the device.
    """
    if kv_stop is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    longest = jnp.max(kv_stop, axis=1)
    uniform = jnp.all((kv_stop == 0) | (kv_stop == longest[:, None]))

    def by_length(q: Array, k: Array, v: Array) -> Array:
        # A length of 0 is not defined for every cuDNN version; such rows are zeroed below.
        lengths = jnp.maximum(longest, 1)
        out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
        return jnp.where((kv_stop > 0)[:, :, None, None], out, 0)

    def by_query(q: Array, k: Array, v: Array) -> Array:
        start, scale = jnp.zeros_like(kv_stop), q.shape[-1] ** -0.5
        return blockwise_attention(q, k, v, start, kv_stop, scale, _block_sizes(q))[0]

    return jax.lax.cond(uniform, by_length, by_query, q, k, v)
