"""One attention function with several backends.

Every query reads one range of keys. That expresses all that this model needs, at two integers per query
instead of a mask of T x S:

| use | keys that a query reads |
|---|---|
| encoder | all |
| decoder | the ones up to its own position |
| cross-attention | the frames of its own and of earlier media |
| V2V with a window | the frames around its own |
"""

import contextlib
import contextvars
import logging
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import AttentionBackend
from crosslmm_jax.model.attention import cudnn, mosaic, splash
from crosslmm_jax.model.attention.blockwise import MASKED, block_sizes, blockwise_attention
from crosslmm_jax.model.params.partitioning import AxisRules, map_devices

logger = logging.getLogger(__name__)

Backend = AttentionBackend | Literal["mosaic"]  # no config offers "mosaic": the decoder's heads do not fit it

# On a CPU or TPU, scores up to this size are held at once: several times faster to run and to compile.
SMALL_SCORE_BYTES = 32 * 2**20
# A GPU or TPU spends its time reading keys when there are so few queries. Two matrix products and a softmax
# then read them once, as long as the scores take no more than this many bytes.
DECODE_QUERIES, DECODE_SCORE_BYTES = 8, 2**30
# The tokens of a question after a KV cache read a range each, which cuDNN cannot express; the device would
# stop to find that out. Up to so many bytes of scores, matrix products are faster.
QUESTION_SCORE_BYTES = 2**26
# With at least this many bytes of keys and values per row, split-K cuDNN is faster on a GPU. Milliseconds of
# one query on one H200:
#                             plain   cuDNN
#   2B, 256 frames (191 MB)   0.099   0.068
#   7B, 256 frames (382 MB)   0.149   0.114
#   7B, 32 frames (48 MB)     0.06    0.06
SPLIT_DECODE_BYTES = 2**26
VALUE_SPLITS = 64


class ChosenBackend(NamedTuple):
    """The backend of one attention of a traced program."""

    name: str  # of the attention: encoder, self_attention, v2v, t2v; or attention, if it has none
    shape: tuple[int, ...]  # [B, T, N, H] of its queries
    keys: int  # S
    backend: Backend

    def __str__(self) -> str:
        return f"{self.name} of {self.shape} over {self.keys} keys: {self.backend}"


_name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="attention")
_chosen: contextvars.ContextVar[dict[ChosenBackend, None] | None] = contextvars.ContextVar(
    "chosen", default=None
)


@contextlib.contextmanager
def named_attention(name: str) -> Iterator[None]:
    """A `jax.named_scope` that also names the attention inside it for `attention_backends`."""
    token = _name.set(name)
    try:
        with jax.named_scope(name):
            yield
    finally:
        _name.reset(token)


@contextlib.contextmanager
def attention_backends() -> Iterator[dict[ChosenBackend, None]]:
    """Collects the backend of each attention that is traced inside, in order, as the keys of a dict."""
    chosen: dict[ChosenBackend, None] = {}
    token = _chosen.set(chosen)
    try:
        yield chosen
    finally:
        _chosen.reset(token)


def record_backend(q: Array, keys: int, backend: Backend) -> None:
    """Notes the backend of an attention of these queries for `attention_backends`."""
    found = ChosenBackend(_name.get(), q.shape, keys, backend)
    logger.debug("%s", found)
    if (chosen := _chosen.get()) is not None:
        chosen[found] = None


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

    | backend | platform | "auto" takes it for | what it cannot do |
    |---|---|---|---|
    | `reference` | all | scores up to 32 MiB, not on a GPU | long sequences: it holds all scores |
    | `plain` | all | GPU, TPU: up to 8 queries; GPU: scores up to 64 MiB of ranges per query | likewise |
    | `blockwise` | all | all that the others leave | - |
    | `cudnn` | GPU | all that it can do | float32, `kv_start`, head sizes that 8 does not divide |
    | `mosaic` | Hopper GPU | heads of 72 or 80, as SigLIP2's | grouped heads; ranges not known beforehand |
    | `splash` | TPU | 128 rows or more (T * N / K) | `kv_start` with more than 65,535 keys |

    Args:
      q: float[B, T, N, H], queries.
      k: float[B, S, K, H], keys; query head n reads key head n // (N / K). May have an 8-bit dtype, whose
        scales the caller applies. They are converted to the dtype of `q` when they are read, by `blockwise`
        block by block.
      v: float[B, S, K, H], values; likewise.
      causal: query t reads keys 0..t (T = S). Excludes `kv_start` and `kv_stop`.
      kv_start: int32[B, T], first key that a query reads (default 0).
      kv_stop: int32[B, T], one past the last key that a query reads (default S). [B, 1] holds for all queries
        of a row; as a numpy array it is known at compile time.
      backend: one of the table, or "auto".
      rules: logical axis -> mesh axes, for the kernels that the compiler cannot shard (splash, mosaic).
        None on one device; only then does "auto" take cuDNN for up to 8 queries.
      axes: logical axes of the batch and of the heads.

    Returns:
      float[B, T, N, H] in the dtype of `q`. Scores and sums are float32 in every backend.

    Raises:
      ValueError: `causal` together with ranges, or with T != S; "cudnn", "mosaic" or "splash" where it does
        not apply.
    """
    if causal and (kv_start is not None or kv_stop is not None or q.shape[1] != k.shape[1]):
        raise ValueError("causal attention takes as many keys as queries, and no kv_start or kv_stop")
    if backend == "auto":
        chosen = _choose(q, k, kv_start, kv_stop, rules, causal=causal, axes=axes)
    else:
        chosen = backend
    record_backend(q, k.shape[1], chosen)
    if chosen == "mosaic":
        return mosaic.mosaic_attention(q, k, v, kv_start, kv_stop, causal=causal, rules=rules, axes=axes)
    if chosen == "cudnn":
        cudnn.check(q, kv_start)
        return cudnn.cudnn_attention(q, k.astype(q.dtype), v.astype(q.dtype), causal=causal, kv_stop=kv_stop)
    kv_stop = None if kv_stop is None else jnp.broadcast_to(kv_stop, q.shape[:2])
    if chosen == "splash":
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        stop = _ranges(q, k, causal=True, kv_start=None, kv_stop=None)[1] if causal else kv_stop
        return map_devices(splash.splash_attention, q, k, v, kv_start, stop, rules=rules, axes=axes)
    start, stop = _ranges(q, k, causal=causal, kv_start=kv_start, kv_stop=kv_stop)
    if chosen == "reference":
        return reference_attention(q, k, v, start, stop)
    if chosen == "plain":
        return plain_attention(q, k, v, start, stop)
    return blockwise_attention(q, k, v, start, stop, q.shape[-1] ** -0.5, block_sizes(q))[0]


def _choose(
    q: Array, k: Array, kv_start: Array | None, kv_stop: Array | np.ndarray | None = None,
    rules: AxisRules | None = None, *, causal: bool = False,
    axes: tuple[str, str | None] = ("act_batch", "act_heads"),
) -> Backend:  # fmt: skip
    """The backend of "auto": the first rule that holds for the platform and the shapes."""
    batch, length, heads, _ = q.shape
    score_bytes = batch * length * heads * k.shape[1] * 4
    is_decode = length <= DECODE_QUERIES
    platform = jax.default_backend()
    if platform == "gpu":
        fused = cudnn.is_applicable(q, kv_start)
        # Very many keys: split-K fills the GPU and is faster, by the table above.
        if is_decode and fused and rules is None and _is_long_decode(q, k, kv_stop):
            return "cudnn"
        # Few queries: reading the keys is all the work, and matrix products do it once.
        if is_decode and score_bytes <= DECODE_SCORE_BYTES:
            return "plain"
        if kv_stop is not None and kv_stop.shape[1] > 1 and score_bytes <= QUESTION_SCORE_BYTES:
            return "plain"
        # cuDNN computes heads of 72 as if they had 128 columns.
        if fused and mosaic.is_applicable(q, k, kv_start, kv_stop, causal=causal, rules=rules, axes=axes):
            return "mosaic"
        return "cudnn" if fused else "blockwise"
    if platform == "tpu" and is_decode and score_bytes <= DECODE_SCORE_BYTES:
        return "plain"
    # Small scores: faster to run and to compile than anything that works by blocks.
    if score_bytes <= SMALL_SCORE_BYTES:
        return "reference"
    # Splash, unless its smallest block would be mostly padding.
    return "splash" if platform == "tpu" and splash.is_worthwhile(q, k, kv_start) else "blockwise"


def _is_long_decode(q: Array, k: Array, kv_stop: Array | np.ndarray | None) -> bool:
    """Whether split-K cuDNN reads these keys and values faster, and where they lie: it copies odd lengths."""
    same_for_row = kv_stop is None or kv_stop.shape[1] == 1
    row_bytes = 2 * k.size // k.shape[0] * k.dtype.itemsize
    is_long = k.shape[1] % 2 == 0 and row_bytes >= SPLIT_DECODE_BYTES
    return same_for_row and k.dtype == q.dtype and is_long


def _ranges(
    q: Array, k: Array, *, causal: bool, kv_start: Array | None, kv_stop: Array | None
) -> tuple[Array, Array]:
    """int32[B, T] first key of every query, and one past its last."""
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
    """The definition, in float32 and with all scores held at once. Tests compare the other backends to it."""
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
    """Attention of a few queries, as in decoding: products in the dtype of `q`, all scores held in float32.

    One product of [T*N, K*H] by [K*H, S] scores all queries of a row against the keys of all heads: a query
    is zero outside the columns of its key head, and of its output only these columns are kept. That is more
    arithmetic, but keys and values are read once and where they lie. With one product per head, XLA would
    first copy them in another order.
    """
    if k.dtype != q.dtype:
        # The barrier ties 8-bit keys to the queries. No generated token changes them, so XLA would otherwise
        # convert them once, before the loop over tokens, and every token would read the wide copy.
        q, k, v = jax.lax.optimization_barrier((q, k, v))
        k, v = k.astype(q.dtype), v.astype(q.dtype)
    batch, length, heads, size = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    key_head = jnp.repeat(jnp.eye(kv_heads, dtype=q.dtype), heads // kv_heads, axis=0)  # [N, K], one-hot
    wide = jnp.einsum("btnh,nk->btnkh", q, key_head).reshape(batch, length * heads, kv_heads * size)
    scores = jnp.einsum(
        "bqw,bsw->bqs", wide, k.reshape(batch, keys, -1), preferred_element_type=jnp.float32
    ).reshape(batch, length, heads, keys)
    positions = jnp.arange(keys)
    visible = ((positions >= kv_start[:, :, None]) & (positions < kv_stop[:, :, None]))[:, :, None]
    scores = jnp.where(visible, scores * size**-0.5, MASKED)
    p = jnp.where(visible, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)), 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(total > 0, total, 1.0)
    # The sum over many keys is split here: XLA would split it too on a GPU, but pad and so copy all values.
    splits = math.gcd(keys, VALUE_SPLITS)
    p = p.astype(v.dtype).reshape(batch, length * heads, splits, -1)
    v = v.reshape(batch, splits, keys // splits, -1)
    out = jnp.sum(jnp.einsum("bqcs,bcsw->bcqw", p, v, preferred_element_type=jnp.float32), axis=1)
    out = out.reshape(batch, length, heads, kv_heads, size)
    return jnp.einsum("btnkh,nk->btnh", out, key_head.astype(jnp.float32)).astype(q.dtype)
