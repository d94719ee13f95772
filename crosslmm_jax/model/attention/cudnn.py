"""cuDNN's fused attention: one number of keys per row, and split-K where the GPU would not be full.

cuDNN divides the work into blocks: 128 queries of one head, which read all keys. The text of a prompt, 64
queries of 12 heads over the 186,624 tokens of 256 frames, is 12 blocks. On one H200 with its 132
multiprocessors that takes 2.2 ms; with the keys in 18 splits, a trial took 0.19 ms. So where blocks do not
fill the GPU, the keys are split too, and the partial results are merged exactly by their log-sum-exp. The
queries that share a key head are first joined into one longer query, which fills the blocks.

Gradients need no splits: a backward pass has one block per 128 keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from crosslmm_jax.model.attention.blockwise import MASKED, RESIDUALS, block_sizes, blockwise_attention

# Implementation of `jax.nn.dot_product_attention`. Tests use "xla", since CPUs have no cuDNN.
IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"
QUERY_BLOCK = 128  # queries of one block
MULTIPROCESSORS = 132  # of Hopper; for GPUs that do not say how many they have
MIN_KEYS_PER_SPLIT = 512
MAX_SPLITS = 128
SPLIT_COST = 1024  # keys that could be read in the time that a split takes to begin and end
MAX_SPLIT_TIME = 0.95  # of the time without splits; above, splits are not worthwhile

# From the gradient of the output to the gradients of queries, keys and values; a pytree of residuals.
Backward = Callable[[Array], tuple[Array, Array, Array]]


def is_applicable(q: Array, kv_start: Array | None) -> bool:
    """Whether cuDNN takes these queries float[B, T, N, H] and these ranges."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and kv_start is None


def check(q: Array, kv_start: Array | None) -> None:
    """Raises a `ValueError` where cuDNN is not applicable."""
    if not is_applicable(q, kv_start):
        raise ValueError(
            "attention backend 'cudnn' needs bfloat16 or float16, a head size divisible by 8 and no kv_start;"
            f" got {q.dtype}, head size {q.shape[-1]}; use 'auto' or 'blockwise'"
        )


def cudnn_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    causal: bool,
    kv_stop: Int[Array, "b t"] | Int[Array, "b 1"] | Int[np.ndarray, "b 1"] | None,
) -> Float[Array, "b t n h"]:
    """Attention of each query over its first `kv_stop` keys; arguments as of `attention`.

    Rows in which every query reads either nothing or the same keys run on cuDNN. That is the common case: one
    medium per row. Other rows run blockwise. The device decides, except for a `kv_stop` given per row.
    """
    if kv_stop is None:
        return _fused(q, k, v, None, causal)
    stop, longest = jnp.asarray(kv_stop), jnp.max(kv_stop, axis=1)
    all_read_some = isinstance(kv_stop, np.ndarray) and kv_stop.min() > 0

    def all_keys(q: Array, k: Array, v: Array) -> Array:
        return _fused(q, k, v, None, False)

    def same_for_row(q: Array, k: Array, v: Array) -> Array:
        # Not every cuDNN version defines a length of 0; such rows are zeroed below.
        out = cast(Array, _fused(q, k, v, jnp.maximum(longest, 1), False))
        return out if all_read_some else jnp.where((stop > 0)[:, :, None, None], out, 0)

    if stop.shape[1] == 1:
        return same_for_row(q, k, v)

    def by_query(q: Array, k: Array, v: Array) -> Array:
        start, scale = jnp.zeros_like(stop), q.shape[-1] ** -0.5
        return blockwise_attention(q, k, v, start, stop, scale, block_sizes(q))[0]

    # Without lengths cuDNN takes a tenth less time.
    is_whole = jnp.all(stop == k.shape[1])
    is_uniform = jnp.all((stop == 0) | (stop == longest[:, None]))
    chosen = jnp.where(is_whole, 0, jnp.where(is_uniform, 1, 2))
    return jax.lax.switch(chosen, (all_keys, same_for_row, by_query), q, k, v)


def _call(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool = False) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation=IMPLEMENTATION
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool) -> Array:
    """cuDNN over the first `lengths` keys of each row, or over all keys.

    Only the rules for gradients below pad queries and keys to even lengths: cuDNN's backward pass takes no
    other, and an encoder with 27 x 27 patches has odd ones.
    """
    splits = 0 if causal else best_num_splits(q.shape, k.shape)
    return split_attention(q, k, v, lengths, splits)[0] if splits else _call(q, k, v, lengths, causal)


def _fused_even(q: Array, k: Array, v: Array, lengths: Array | None, causal: bool) -> Array:
    """`_call` on even lengths. No query reads the padded key, and the padded query is dropped."""
    length, odd_keys = q.shape[1], k.shape[1] % 2
    if odd_keys and not causal and lengths is None:
        lengths = jnp.full((q.shape[0],), k.shape[1], jnp.int32)
    q = _padded(q, length % 2)
    k, v = _padded(k, odd_keys), _padded(v, odd_keys)
    return _call(q, k, v, lengths, causal)[:, :length]


def _padded(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, count), (0, 0), (0, 0))) if count else x


def fused_forward(
    q: Array, k: Array, v: Array, lengths: Array | None, causal: bool
) -> tuple[Array, Backward]:
    """The output, and the residuals of `fused_backward`."""
    out, backward = jax.vjp(lambda q, k, v: _fused_even(q, k, v, lengths, causal), q, k, v)
    return out, jax.tree.map(lambda x: checkpoint_name(x, RESIDUALS), backward)


def fused_backward(causal: bool, backward: Backward, d_out: Array) -> tuple[Array, Array, Array, None]:
    """Gradients of queries, keys and values, and None for the lengths."""
    return (*backward(d_out), None)


_fused.defvjp(fused_forward, fused_backward)


def best_num_splits(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> int:
    """Number of equal splits of the keys, or 0 to call cuDNN as it is.

    The time is estimated as rounds of blocks on all multiprocessors, times the keys of a block plus
    `SPLIT_COST`. Where the number of keys is even, only splits of even length are considered, since
    `_with_log_sum_exp` copies odd ones. The shapes are of the whole batch: where it is sharded, a device has
    fewer blocks and may be filled less.
    """
    batch, length, heads, _ = q_shape
    keys, kv_heads = k_shape[1], k_shape[2]
    at_once = multiprocessors()

    def time(rows: int, queries: int, splits: int) -> float:
        blocks = batch * rows * math.ceil(queries / QUERY_BLOCK) * splits
        return math.ceil(blocks / at_once) * (keys / splits + SPLIT_COST)

    most = min(keys // MIN_KEYS_PER_SPLIT, MAX_SPLITS)
    step = 2 if keys % 2 == 0 else 1
    choices = [splits for splits in range(1, most + 1) if keys % (step * splits) == 0]
    joined = functools.partial(time, kv_heads, heads // kv_heads * length)
    best = min(choices, key=joined, default=0)
    return best if best and joined(best) < MAX_SPLIT_TIME * time(heads, length, 1) else 0


def multiprocessors() -> int:
    """Multiprocessors of the GPU."""
    return getattr(jax.local_devices()[0], "core_count", None) or MULTIPROCESSORS


def split_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    lengths: Int[Array, " b"] | None,
    splits: int,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Split-K attention: cuDNN over equal splits of the keys, as rows of one call, merged in float32.

    Args:
      q: float[B, T, N, H].
      k: float[B, S, K, H]; S is a multiple of `splits`.
      v: float[B, S, K, H].
      lengths: int32[B], number of keys that each row reads, at least 1; None: all.
      splits: number of splits.

    Returns:
      float[B, T, N, H] in the dtype of `q`, and float32[B, T, N] log-sum-exp. Neither is differentiable.
    """
    batch, length, heads, size = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    q = q.reshape(batch, length, kv_heads, -1, size)
    q = jnp.einsum("btkgh->bgtkh", q).reshape(batch, 1, -1, kv_heads, size)
    q = jnp.broadcast_to(q, (batch, splits, *q.shape[2:])).reshape(batch * splits, -1, kv_heads, size)
    k, v = (x.reshape(batch * splits, keys // splits, kv_heads, size) for x in (k, v))
    if lengths is not None:
        begins = jnp.arange(splits) * (keys // splits)
        lengths = jnp.clip(lengths[:, None] - begins, 0, keys // splits).reshape(-1)
    out, lse = _with_log_sum_exp(q, k, v, None if lengths is None else jnp.maximum(lengths, 1))
    if lengths is not None:
        lse = jnp.where(lengths[:, None, None] > 0, lse, MASKED)
    out, lse = (x.reshape(batch, splits, *x.shape[1:]) for x in (out, lse))
    total = jax.nn.logsumexp(lse, axis=1)
    weight = jnp.exp(lse - total[:, None])[..., None]
    out = jnp.sum(weight * out.astype(jnp.float32), axis=1).astype(q.dtype)
    out = out.reshape(batch, -1, length, kv_heads, size)
    total = total.reshape(batch, -1, length, kv_heads)
    out = jnp.einsum("bgtkh->btkgh", out).reshape(batch, length, heads, size)
    return out, jnp.einsum("bgtk->btkg", total).reshape(batch, length, heads)


def _with_log_sum_exp(q: Array, k: Array, v: Array, lengths: Array | None) -> tuple[Array, Array]:
    """Attention, and float32[B, T, N] log-sum-exp of its scores.

    `jax.nn.dot_product_attention` rounds the log-sum-exp that it returns to the dtype of the queries, which
    moves weights by up to 3%. The residual of its backward pass is not rounded: the one float32 array
    [B, N, T].
    """
    length, odd_keys = q.shape[1], k.shape[1] % 2
    if odd_keys and lengths is None:
        lengths = jnp.full((q.shape[0],), k.shape[1], jnp.int32)
    # Asking for residuals, like a backward pass, needs even lengths.
    q, k, v = _padded(q, length % 2), _padded(k, odd_keys), _padded(v, odd_keys)
    out, backward = jax.vjp(lambda q: _call(q, k, v, lengths), q)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    (lse,) = [x for x in jax.tree.leaves(backward) if x.dtype == jnp.float32 and x.shape == shape]
    return out[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]
