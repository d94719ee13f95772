"""Attention by blocks with an online softmax: portable and exact, without any T x S array.

The scheme is FlashAttention's (Dao 2023). The forward pass keeps a running maximum and sum per query. The
backward pass recomputes the probabilities of a block from the saved log-sum-exp. Key blocks that no query of
a block may read are skipped at run time.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# `jax.checkpoint` policies know the residuals of an attention's backward pass by this name.
RESIDUALS = "attention_residuals"
# Score of a key that is not read. Finite, so that the maximum of none is no NaN; far below any score.
MASKED = -1e30
# Small blocks leave a GPU idle: there, the scores of one block may take this many bytes.
GPU_SCORE_BYTES = 64 * 2**20


class BlockSizes(NamedTuple):
    """Queries and keys of one block. The largest array is the scores, float32[B, N, query, key]."""

    query: int = 512
    key: int = 1024


def block_sizes(q: Float[Array, "b t n h"]) -> BlockSizes:
    """The default block sizes; on a GPU, fewer queries get larger blocks of keys."""
    if jax.default_backend() != "gpu":
        return BlockSizes()
    batch, length, heads, _ = q.shape
    query = min(length, BlockSizes().query)
    key = GPU_SCORE_BYTES // (4 * batch * heads * query) // 1024 * 1024
    return BlockSizes(query, max(1024, key))


def blockwise_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    kv_start: Int[Array, "b t"],
    kv_stop: Int[Array, "b t"],
    scale: float,
    blocks: BlockSizes = BlockSizes(),
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Attention of query `t` over keys `kv_start[t] <= s < kv_stop[t]`, and its log-sum-exp.

    Returns:
      float[B, T, N, H] in the dtype of `q`, and float32[B, T, N] log-sum-exp of the scaled scores. A query
      that reads no key gets 0 and `MASKED`. Both are differentiable.
    """
    return _differentiable(q, k, v, kv_start, kv_stop, scale, blocks)


def _forward(
    q: Array, k: Array, v: Array, kv_start: Array, kv_stop: Array, scale: float, blocks: BlockSizes
) -> tuple[Array, Array]:
    batch, length, heads, size = q.shape
    # The barrier ties the ranges to the queries. Ranges are the same in all layers, so XLA would otherwise
    # move the masks of all blocks, T x S in sum, out of a differentiated scan over layers and keep them.
    q, kv_start, kv_stop = jax.lax.optimization_barrier((q, kv_start, kv_stop))
    q_blocks, start_blocks, stop_blocks = _split_queries(q, kv_start, kv_stop, k.shape[2], blocks.query)
    attend = functools.partial(_attend_block, k=k, v=v, scale=scale, block=min(blocks.key, k.shape[1]))
    if len(q_blocks) == 1:
        out, lse = attend((q_blocks[0], start_blocks[0], stop_blocks[0]))
        out, lse = out[None], lse[None]
    else:
        out, lse = jax.lax.map(attend, (q_blocks, start_blocks, stop_blocks))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, size)[:, :length]
    lse = jnp.moveaxis(lse, 0, 1).reshape(batch, -1, heads)[:, :length]
    return out.astype(q.dtype), lse


def _split_queries(q: Array, kv_start: Array, kv_stop: Array, kv_heads: int, block: int) -> tuple[Array, ...]:
    """Queries as [blocks, B, block, K, G, H], and both ranges as [blocks, B, block]."""
    batch, length, heads, size = q.shape
    count = -(-length // block)
    block = -(-length // count)
    pad = count * block - length
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q = q.reshape(batch, count, block, kv_heads, heads // kv_heads, size)
    # Padded queries read no key: start 0, stop 0.
    ranges = [jnp.pad(x, ((0, 0), (0, pad))).reshape(batch, count, block) for x in (kv_start, kv_stop)]
    return tuple(jnp.moveaxis(x, 1, 0) for x in (q, *ranges))


def _key_block(k: Array, v: Array, index: Array, block: int) -> tuple[Array, Array, Array, Array]:
    """Keys, values and positions of a block, and which of them are `fresh`: in no earlier block.

    The last block ends at S, so that it may overlap the one before.
    """
    begin = jnp.minimum(index * block, k.shape[1] - block)
    k_block = jax.lax.dynamic_slice_in_dim(k, begin, block, axis=1)
    v_block = jax.lax.dynamic_slice_in_dim(v, begin, block, axis=1)
    positions = begin + jnp.arange(block)
    return k_block, v_block, positions, positions >= index * block


def _visible(kv_start: Array, kv_stop: Array, positions: Array, fresh: Array) -> Array:
    """bool[B, 1, 1, T, S] of one pair of blocks."""
    inside = (positions >= kv_start[:, :, None]) & (positions < kv_stop[:, :, None]) & fresh
    return inside[:, None, None]


def _any_visible(kv_start: Array, kv_stop: Array, index: Array, block: int) -> Array:
    return jnp.any((kv_start < (index + 1) * block) & (kv_stop > index * block) & (kv_stop > kv_start))


def _product(equation: str, left: Array, right: Array) -> Array:
    """An einsum with float32 sums over arrays that begin with the batch.

    A batch of one is left out. Matrix products on a GPU read keys and values [S, K, H] where they lie, but
    need [B, S, K, H] as [B, K, S, H]: XLA would hold a copy of all of them in that order.
    """
    if left.shape[0] > 1:
        return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
    equation = equation.replace("b", "")
    return jnp.einsum(equation, left[0], right[0], preferred_element_type=jnp.float32)[None]


def _scores(q: Array, k: Array, scale: float) -> Array:
    """float32[B, K, G, T, S]."""
    return scale * _product("btkgh,bskh->bkgts", q, k)


# Running maxima, sums and outputs of the queries of a block: [B, K, G, t], the same, [B, K, G, t, H].
_Running = tuple[Array, Array, Array]


def _attend_block(
    queries: tuple[Array, ...], *, k: Array, v: Array, scale: float, block: int
) -> tuple[Array, Array]:
    """One block of queries over all keys: float32[B, t, N, H] and log-sum-exp float32[B, t, N]."""
    q, kv_start, kv_stop = queries
    batch, length, kv_heads, groups, size = q.shape

    def add_block(carry: _Running, index: Array) -> _Running:
        maximum, total, out = carry
        k_block, v_block, positions, fresh = _key_block(k, v, index, block)
        k_block, v_block = k_block.astype(q.dtype), v_block.astype(q.dtype)  # from 8 bits, perhaps
        visible = _visible(kv_start, kv_stop, positions, fresh)
        scores = jnp.where(visible, _scores(q, k_block, scale), MASKED)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        p = jnp.where(visible, jnp.exp(scores - new_maximum[..., None]), 0.0)
        decay = jnp.exp(maximum - new_maximum)
        values = _product("bkgts,bskh->bkgth", p.astype(v_block.dtype), v_block)
        return new_maximum, total * decay + jnp.sum(p, axis=-1), out * decay[..., None] + values

    def body(carry: _Running, index: Array) -> tuple[_Running, None]:
        seen = _any_visible(kv_start, kv_stop, index, block)
        return jax.lax.cond(seen, add_block, lambda carry, _: carry, carry, index), None

    shape = (batch, kv_heads, groups, length)
    carry = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, size)))
    if k.shape[1] <= block:
        carry = add_block(carry, jnp.int32(0))
    else:
        carry, _ = jax.lax.scan(body, carry, jnp.arange(-(-k.shape[1] // block)))
    maximum, total, out = carry
    seen = total > 0
    out = jnp.where(seen[..., None], out / jnp.where(seen, total, 1.0)[..., None], 0.0)
    lse = jnp.where(seen, maximum + jnp.log(jnp.where(seen, total, 1.0)), MASKED)
    out = jnp.einsum("bkgth->btkgh", out).reshape(batch, length, kv_heads * groups, size)
    return out, jnp.einsum("bkgt->btkg", lse).reshape(batch, length, kv_heads * groups)


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(5, 6))
_Residuals = tuple[Array, ...]  # q, k, v, kv_start, kv_stop, out, lse
_Gradients = tuple[Array, Array, Array]  # of queries, keys and values


def _forward_rule(
    q: Array, k: Array, v: Array, kv_start: Array, kv_stop: Array, scale: float, blocks: BlockSizes
) -> tuple[tuple[Array, Array], _Residuals]:
    out, lse = _forward(q, k, v, kv_start, kv_stop, scale, blocks)
    q, k, v, kept, lse = (checkpoint_name(x, RESIDUALS) for x in (q, k, v, out, lse))
    return (out, lse), (q, k, v, kv_start, kv_stop, kept, lse)


def _backward_rule(
    scale: float, blocks: BlockSizes, residuals: _Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, kv_start, kv_stop, out, lse = residuals
    d_out, d_lse = cotangents
    # With p = exp(s - lse): ds = p * (d_out . v - d_out . out + d_lse).
    offset = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    kv_heads, block = k.shape[2], min(blocks.key, k.shape[1])
    split = functools.partial(_split_queries, kv_heads=kv_heads, block=blocks.query)
    q_blocks, starts, stops = split(q, kv_start, kv_stop)
    d_out_blocks, _, _ = split(d_out, kv_start, kv_stop)
    rows, _, _ = split(jnp.stack([lse, offset], axis=-1), kv_start, kv_stop)
    queries = (q_blocks, d_out_blocks, rows, starts, stops)

    def body(carry: _Gradients, index: Array) -> tuple[_Gradients, None]:
        d_q, d_k, d_v = carry
        k_block, v_block, positions, fresh = _key_block(k, v, index, block)
        begin = positions[0]
        step = functools.partial(
            _backward_block, k=k_block, v=v_block, positions=positions, fresh=fresh, scale=scale
        )
        zero = jnp.zeros(k_block.shape, jnp.float32)
        (dk_block, dv_block), d_q = jax.lax.scan(step, (zero, zero), (d_q, queries))
        return (d_q, _add_slice(d_k, dk_block, begin), _add_slice(d_v, dv_block, begin)), None

    carry = (jnp.zeros(q_blocks.shape, jnp.float32), jnp.zeros_like(k), jnp.zeros_like(v))
    (d_q, d_k, d_v), _ = jax.lax.scan(body, carry, jnp.arange(-(-k.shape[1] // block)))
    d_q = jnp.moveaxis(d_q, 0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]
    return d_q.astype(q.dtype), d_k, d_v, None, None


def _add_slice(x: Array, update: Array, begin: Array) -> Array:
    """`x` with `update` added from `begin` on; only the last block may find keys that are written already."""
    current = jax.lax.dynamic_slice_in_dim(x, begin, update.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, current + update.astype(x.dtype), begin, axis=1)


def _backward_block(
    carry: tuple[Array, Array], inputs: tuple[Array, tuple[Array, ...]], *, k: Array, v: Array,
    positions: Array, fresh: Array, scale: float,
) -> tuple[tuple[Array, Array], Array]:  # fmt: skip
    """Adds the gradients of one block of queries and one block of keys: (d_k, d_v), d_q."""
    d_q, (q, d_out, rows, kv_start, kv_stop) = inputs

    def add(carry: tuple[Array, Array], d_q: Array) -> tuple[tuple[Array, Array], Array]:
        d_k, d_v = carry
        lse, offset = (jnp.einsum("btkg->bkgt", rows[..., i])[..., None] for i in range(2))
        visible = _visible(kv_start, kv_stop, positions, fresh)
        scores = jnp.where(visible, _scores(q, k, scale), MASKED)
        p = jnp.where(visible, jnp.exp(scores - lse), 0.0)
        d_p = _product("btkgh,bskh->bkgts", d_out, v)
        d_s = (scale * p * (d_p - offset)).astype(q.dtype)
        p = p.astype(v.dtype)
        d_v = d_v + _product("bkgts,btkgh->bskh", p, d_out)
        d_k = d_k + _product("bkgts,btkgh->bskh", d_s, q)
        d_q = d_q + _product("bkgts,bskh->btkgh", d_s, k)
        return (d_k, d_v), d_q

    seen = jnp.any((kv_start <= positions[-1]) & (kv_stop > positions[0]) & (kv_stop > kv_start))
    return jax.lax.cond(seen, add, lambda carry, d_q: (carry, d_q), carry, d_q)


_differentiable.defvjp(_forward_rule, _backward_rule)
