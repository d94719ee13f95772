"""Attention on a TPU: JAX's splash kernel, with a range of keys per query as its mask.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) computes a mask from one integer per query and
the positions of the keys, and skips the blocks that a map marks as empty. Here the integer holds the query's
range, and the map follows from the ranges on the device. So every query may have its own range, and no mask
is ever stored. On other platforms the same kernel runs in Pallas's interpreter.

Query heads that share a key head become rows of one longer query, so that their keys are read once. Sizes are
padded to the tiles of the hardware.
"""

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from crosslmm_jax.model.attention.blockwise import BlockSizes

LANES = 128  # the last dimension of a TPU's tile: head sizes and blocks are multiples of it
BLOCKS = BlockSizes(512, 1024)
# A range with a start is packed into the 32 bits per query that the kernel has.
STOP_BITS = 16
MAX_KEYS_WITH_START = 2**STOP_BITS - 1
# Largest map of blocks: it lies in scalar memory, of which a TPU core has about 1 MB.
MAX_MAPPED_BLOCKS = 2**16


def splash_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    kv_start: Int[Array, "b t"] | None,
    kv_stop: Int[Array, "b t"] | None,
    blocks: BlockSizes = BLOCKS,
) -> Float[Array, "b t n h"]:
    """Attention of query `t` over keys `kv_start[t] <= s < kv_stop[t]`; differentiable in q, k and v.

    Args:
      q: float[B, T, N, H].
      k: float[B, S, K, H].
      v: float[B, S, K, H].
      kv_start: int32[B, T], or None for 0; with it, S is at most `MAX_KEYS_WITH_START`.
      kv_stop: int32[B, T], at most S, or None for S.
      blocks: largest blocks of rows (N / K per query) and of keys, multiples of `LANES`.

    Returns:
      float[B, T, N, H] in the dtype of `q`, 0 for a query that reads no key.

    Raises:
      ValueError: as `check`.
    """
    check(k.shape[1], kv_start)
    everything = kv_start is None and kv_stop is None
    size, groups = q.shape[-1], q.shape[2] // k.shape[2]
    block_q, block_kv = _block(q.shape[1] * groups, blocks.query), _block(k.shape[1], blocks.key)
    # The kernel takes no scale. It is applied in float32, before the one rounding to the dtype of `q`.
    rows = _rows((q.astype(jnp.float32) * size**-0.5).astype(q.dtype), k.shape[2], block_q)
    keys, values = _rows(k, k.shape[2], block_kv), _rows(v, k.shape[2], block_kv)
    stop = jnp.full(q.shape[:2], k.shape[1], jnp.int32) if kv_stop is None else kv_stop
    if everything and keys.shape[2] == k.shape[1]:
        ranges = (None, None)
    else:
        ranges = (_per_row(kv_start, groups, rows.shape[2]), _per_row(stop, groups, rows.shape[2]))
    out = _unrows(_attend(rows, keys, values, *ranges, block_q=block_q, block_kv=block_kv), q)
    if everything:
        return out
    # A query that reads no key gets a mean of values from the kernel.
    seen = stop > (0 if kv_start is None else kv_start)
    return jnp.where(seen[..., None, None], out, 0)


def check(keys: int, kv_start: Array | None) -> None:
    """Raises a `ValueError` where a start does not fit into 32 bits beside its stop: too many keys."""
    if kv_start is not None and keys > MAX_KEYS_WITH_START:
        raise ValueError(
            f"attention backend 'splash' with kv_start reads at most {MAX_KEYS_WITH_START} keys, not {keys};"
            " use 'auto' or 'blockwise'"
        )


def is_worthwhile(q: Array, k: Array, kv_start: Array | None) -> bool:
    """Whether the kernel applies, and its smallest block of rows is not mostly padding as for one token."""
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    return rows >= LANES and (kv_start is None or k.shape[1] <= MAX_KEYS_WITH_START)


def _block(length: int, limit: int) -> int:
    """Size of equal blocks of at most `limit`, rounded up to whole tiles."""
    count = -(-length // limit)
    return -(-length // (count * LANES)) * LANES


def _pad(x: Array, axis: int, multiple: int) -> Array:
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, pads)


def _rows(x: Float[Array, "b t n h"], kv_heads: int, block: int) -> Float[Array, "b k r d"]:
    """Tokens and the heads of a group as rows, by the key head that they read: [B, K, T*G, H], padded."""
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, size)
    x = jnp.einsum("btkgh->bktgh", x).reshape(batch, kv_heads, -1, size)
    return _pad(_pad(x, 3, LANES), 2, block)


def _unrows(x: Float[Array, "b k r d"], q: Float[Array, "b t n h"]) -> Float[Array, "b t n h"]:
    """The inverse of `_rows`, to the shape of `q`."""
    batch, length, heads, size = q.shape
    x = x[:, :, : length * heads // x.shape[1], :size].reshape(batch, x.shape[1], length, -1, size)
    return jnp.einsum("bktgh->btkgh", x).reshape(q.shape)


def _per_row(x: Int[Array, "b t"] | None, groups: int, rows: int) -> Int[Array, "b r"] | None:
    """The value of each row: a query's for the G heads of its group, 0 for padding, which reads no key."""
    if x is None:
        return None
    x = jnp.repeat(x.astype(jnp.int32), groups, axis=1)
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1])))


def _attend(
    q: Float[Array, "b k r d"], k: Float[Array, "b k s d"], v: Float[Array, "b k s d"],
    start: Int[Array, "b r"] | None, stop: Int[Array, "b r"] | None, *, block_q: int, block_kv: int,
) -> Float[Array, "b k r d"]:  # fmt: skip
    """The kernel on padded rows, compiled on a TPU and interpreted elsewhere."""
    ranges, mask_function = _packed(start, stop)
    runs = None if stop is None else _block_map(start, stop, k.shape[2], block_q=block_q, block_kv=block_kv)
    over_keys, over_queries = _mask_info(runs, axis=1), _mask_info(runs, axis=0)
    sizes = kernel.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=_half(block_kv),
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=_half(block_kv),
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip

    def run(
        interpret: bool, over_keys: MaskInfo, over_queries: MaskInfo, ranges: Array | None,
        q: Array, k: Array, v: Array,
    ) -> Array:  # fmt: skip

        def row(q: Array, k: Array, v: Array, ranges: Array | None) -> Array:
            infos = [info._replace(q_sequence=ranges) for info in (over_keys, over_keys, over_queries)]
            attend = kernel.SplashAttentionKernel(
                *infos, block_sizes=sizes, is_mqa=False, save_residuals=False,
                mask_value=kernel.DEFAULT_MASK_VALUE, attn_logits_soft_cap=None,
                residual_checkpoint_name=None, mask_function=mask_function, interpret=interpret,
            )  # fmt: skip
            return cast(Array, attend(q, k, v))

        return jax.vmap(row, in_axes=(0, 0, 0, None if ranges is None else 0))(q, k, v, ranges)

    return jax.lax.platform_dependent(
        over_keys, over_queries, ranges, q, k, v,
        tpu=functools.partial(run, False), default=functools.partial(run, True),
    )  # fmt: skip


def _half(block: int) -> int:
    """Keys of a block that are computed at once: half of it where that is whole tiles."""
    return block // 2 if block % (2 * LANES) == 0 else block


def _packed(
    start: Array | None, stop: Array | None
) -> tuple[Array | None, Callable[[Array, Array], Array] | None]:
    """int32 per query, and the function from it and key positions to the mask."""
    if stop is None:
        return None, None
    if start is None:
        return stop, _before_stop
    return (start << STOP_BITS) | stop, _within


def _before_stop(stop: Array, position: Array) -> Bool[Array, "..."]:
    return position < stop


def _within(packed: Array, position: Array) -> Bool[Array, "..."]:
    start = jax.lax.shift_right_logical(packed, jnp.int32(STOP_BITS))
    return (position >= start) & (position < (packed & MAX_KEYS_WITH_START))


def _block_map(
    start: Array | None, stop: Array, keys: int, *, block_q: int, block_kv: int
) -> Bool[Array, "i j"] | None:
    """bool: some query of block i reads a key of block j, in any row of the batch; None: too large a map.

    Every block of queries reads at least one: without any, its softmax would divide by 0.
    """
    shape = stop.shape[1] // block_q, keys // block_kv
    if shape[0] * shape[1] > MAX_MAPPED_BLOCKS:
        return None
    first = jnp.zeros_like(stop) if start is None else start
    seen = stop > first
    first = jnp.min(jnp.where(seen, first, keys).reshape(-1, *shape[:1], block_q), axis=(0, 2))
    last = jnp.max(jnp.where(seen, stop, 0).reshape(-1, *shape[:1], block_q), axis=(0, 2))
    begins = jnp.arange(shape[1]) * block_kv
    runs = (first[:, None] < begins + block_kv) & (last[:, None] > begins)
    return runs.at[:, 0].set(runs[:, 0] | ~jnp.any(runs, axis=1))


def _mask_info(runs: Bool[Array, "i j"] | None, *, axis: int) -> MaskInfo:
    """The kernel's map of blocks when it iterates along `axis`: which run, and which to fetch meanwhile."""
    if runs is None:
        return MaskInfo(None, None, None, None, None)
    count = runs.shape[axis]
    index = jnp.arange(count, dtype=jnp.int32)
    index = index[:, None] if axis == 0 else index[None]
    following = jax.lax.cummin(jnp.where(runs, index, count), axis=axis, reverse=True)
    # After the last block that runs, nothing new is fetched.
    latest = jnp.max(jnp.where(runs, index, 0), axis=axis, keepdims=True)
    fetched = jnp.minimum(following, latest)
    return MaskInfo(
        data_next=fetched.astype(jnp.int16 if count < 2**15 else jnp.int32)[None],
        mask_next=None,
        block_mask=runs.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=None,
    )
