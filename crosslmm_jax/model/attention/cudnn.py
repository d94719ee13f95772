"""cuDNN's fused attention: one length of keys a row, and enough blocks for a whole GPU.

cuDNN cuts work into blocks of 128 queries of one head, and a block reads all keys. The text of a prompt, 64
queries of 12 heads over the 186,624 tokens of 256 frames, is 12 blocks: on one H200 (132 multiprocessors)
2.2 ms, where a trial with keys in 18 parts took 0.19. Where blocks do not fill the GPU, keys are cut too, and
the parts are merged by their log-sum-exp, exactly. Queries that share a key head are put one behind the other
first, which makes the blocks full. Only without gradients: a backward pass has a block for every 128 keys.
"""

import functools
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from crosslmm_jax.model.attention.blockwise import MASKED, RESIDUALS, block_sizes, blockwise_attention

# Implementation of the fused attention; tests put "xla" in its place, since CPUs have no cuDNN.
FUSED: Literal["cudnn", "xla"] = "cudnn"
BLOCK = 128  # queries that cuDNN handles at once
MULTIPROCESSORS = 132  # of a GPU that does not say how many it has: Hopper's
FEWEST_KEYS = 512  # of a part
MOST_PARTS = 128
PART_COST = 1024  # keys that could be read in the time that a part takes to begin and end
WORTHWHILE = 0.95  # of the time without parts


def is_applicable(q: Array) -> bool:
    """Whether cuDNN takes queries float[B, T, N, H] of this dtype and head size."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0


def cudnn_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    causal: bool,
    kv_stop: Int[Array, "b t"] | Int[Array, "b 1"] | Int[np.ndarray, "b 1"] | None,
) -> Float[Array, "b t n h"]:
    """Attention of each query over its first `kv_stop` keys; arguments as of `attention`.

    Rows in which every query reads either nothing or the same keys (one medium in the row, the common case)
    run on cuDNN; others run blockwise. Which it is, is decided on the device, but for lengths given by row.
    """
    if kv_stop is None:
        return _fused(q, k, v, None, causal)
    stop, longest = jnp.asarray(kv_stop), jnp.max(kv_stop, axis=1)
    known = isinstance(kv_stop, np.ndarray) and kv_stop.min() > 0  # no query without keys

    def whole(q: Array, k: Array, v: Array) -> Array:
        return _fused(q, k, v, None, False)

    def by_length(q: Array, k: Array, v: Array) -> Array:
        # A length of 0 is not defined for every cuDNN version; such rows are zeroed below.
        out = cast(Array, _fused(q, k, v, jnp.maximum(longest, 1), False))
        return out if known else jnp.where((stop > 0)[:, :, None, None], out, 0)

    if stop.shape[1] == 1:
        return by_length(q, k, v)

    def by_query(q: Array, k: Array, v: Array) -> Array:
        start, scale = jnp.zeros_like(stop), q.shape[-1] ** -0.5
        return blockwise_attention(q, k, v, start, stop, scale, block_sizes(q))[0]

    # Without lengths cuDNN is a tenth faster.
    is_whole = jnp.all(stop == k.shape[1])
    is_uniform = jnp.all((stop == 0) | (stop == longest[:, None]))
    chosen = jnp.where(is_whole, 0, jnp.where(is_uniform, 1, 2))
    return jax.lax.switch(chosen, (whole, by_length, by_query), q, k, v)


def _call(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool = False) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation=FUSED
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool) -> Array:
    """cuDNN over the first `lengths` keys of each row (all keys without).

    Its backward pass takes even lengths only, and an encoder with 27 x 27 patches has odd ones: only where
    gradients are asked for, queries and keys are padded by one.
    """
    parts = 0 if causal else best_parts(q.shape, k.shape)
    return split_attention(q, k, v, lengths, parts)[0] if parts else _call(q, k, v, lengths, causal)


def _fused_even(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool) -> Array:
    """`_fused` on even lengths: what is padded is read by no query, and dropped."""
    length, odd_keys = q.shape[1], k.shape[1] % 2
    if odd_keys and not causal and lengths is None:
        lengths = jnp.full((q.shape[0],), k.shape[1], jnp.int32)
    q = _padded(q, length % 2)
    k, v = _padded(k, odd_keys), _padded(v, odd_keys)
    return _call(q, k, v, lengths, causal)[:, :length]


def _padded(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x


def fused_forward(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool) -> tuple[Array, Any]:
    """Output, and what `fused_backward` needs."""
    out, backward = jax.vjp(lambda q, k, v: _fused_even(q, k, v, lengths, causal), q, k, v)
    return out, jax.tree.map(lambda x: checkpoint_name(x, RESIDUALS), backward)


def fused_backward(causal: bool, backward: Any, d_out: Array) -> tuple[Any, ...]:
    """Gradients of queries, keys, values and (None) lengths."""
    return (*backward(d_out), None)


_fused.defvjp(fused_forward, fused_backward)


def best_parts(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> int:
    """Parts of equal size to cut keys into, or 0 for cuDNN as it is, by the blocks that the GPU runs at once.

    Time is taken as rounds of blocks on all multiprocessors, times the keys of a block and `PART_COST`. Parts
    are of even size where keys are even, since odd ones are copied (`_with_log_sum_exp`). Shapes are those of
    the whole batch: where it is spread over devices, a device has fewer blocks and may be left emptier.
    """
    batch, length, heads, _ = q_shape
    keys, kv_heads = k_shape[1], k_shape[2]
    at_once = multiprocessors()

    def time(rows: int, queries: int, parts: int) -> float:
        blocks = batch * rows * math.ceil(queries / BLOCK) * parts
        return math.ceil(blocks / at_once) * (keys / parts + PART_COST)

    most = min(keys // FEWEST_KEYS, MOST_PARTS)
    step = 2 if keys % 2 == 0 else 1
    choices = [parts for parts in range(1, most + 1) if keys % (step * parts) == 0]
    folded = functools.partial(time, kv_heads, heads // kv_heads * length)
    best = min(choices, key=folded, default=0)
    return best if best and folded(best) < WORTHWHILE * time(heads, length, 1) else 0


def multiprocessors() -> int:
    """Of the GPU."""
    return getattr(jax.local_devices()[0], "core_count", None) or MULTIPROCESSORS


def split_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    lengths: Int[Array, " b"] | None,
    parts: int,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """cuDNN over `parts` equal parts of the keys, as rows of one call, merged in float32.

    Args:
      q: float[B, T, N, H].
      k: float[B, S, K, H]; S is a multiple of `parts`.
      v: float[B, S, K, H].
      lengths: int32[B] from 1, keys of a row that are read; None: all.
      parts: how many.

    Returns:
      float[B, T, N, H] in the dtype of `q`, and float32[B, T, N] log-sum-exp. Neither is differentiable.
    """
    batch, length, heads, size = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    q = q.reshape(batch, length, kv_heads, -1, size)
    q = jnp.einsum("btkgh->bgtkh", q).reshape(batch, 1, -1, kv_heads, size)
    q = jnp.broadcast_to(q, (batch, parts, *q.shape[2:])).reshape(batch * parts, -1, kv_heads, size)
    k, v = (x.reshape(batch * parts, keys // parts, kv_heads, size) for x in (k, v))
    if lengths is not None:
        begins = jnp.arange(parts) * (keys // parts)
        lengths = jnp.clip(lengths[:, None] - begins, 0, keys // parts).reshape(-1)
    out, lse = _with_log_sum_exp(q, k, v, None if lengths is None else jnp.maximum(lengths, 1))
    if lengths is not None:
        lse = jnp.where(lengths[:, None, None] > 0, lse, MASKED)
    out, lse = (x.reshape(batch, parts, *x.shape[1:]) for x in (out, lse))
    total = jax.nn.logsumexp(lse, axis=1)
    weight = jnp.exp(lse - total[:, None])[..., None]
    out = jnp.sum(weight * out.astype(jnp.float32), axis=1).astype(q.dtype)
    out = out.reshape(batch, -1, length, kv_heads, size)
    total = total.reshape(batch, -1, length, kv_heads)
    out = jnp.einsum("bgtkh->btkgh", out).reshape(batch, length, heads, size)
    return out, jnp.einsum("bgtk->btkg", total).reshape(batch, length, heads)


def _with_log_sum_exp(q: Array, k: Array, v: Array, lengths: Array | None) -> tuple[Array, Array]:
    """Attention, and float32[B, T, N] log-sum-exp of its scores.

    The log-sum-exp that `jax.nn.dot_product_attention` returns is rounded to the dtype of the queries, by up
    to 3% of a weight. What it keeps for the backward pass is not: the one float32 array [B, N, T].
    """
    length, odd_keys = q.shape[1], k.shape[1] % 2
    if odd_keys and lengths is None:
        lengths = jnp.full((q.shape[0],), k.shape[1], jnp.int32)
    # As for a backward pass, lengths are to be even.
    q, k, v = _padded(q, length % 2), _padded(k, odd_keys), _padded(v, odd_keys)
    out, backward = jax.vjp(lambda q: _call(q, k, v, lengths), q)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    (lse,) = [x for x in jax.tree.leaves(backward) if x.dtype == jnp.float32 and x.shape == shape]
    return out[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]
