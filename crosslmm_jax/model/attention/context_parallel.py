"""Cross-attention to frames that are sharded over devices, merged exactly by log-sum-exp.

Each device reads the keys of its own frames. One output and one log-sum-exp per query and head cross between
devices, and never a key. That is cheaper than ring attention where there are fewer queries than keys, as
here.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import AttentionBackend
from crosslmm_jax.model.attention.blockwise import MASKED, blockwise_attention
from crosslmm_jax.model.attention.dispatch import attention, record_backend
from crosslmm_jax.model.params.partitioning import AxisRules, dividing_axes, num_shards


def context_parallel_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b f p k h"],
    v: Float[Array, "b f p k h"],
    *,
    kv_stop: Int[Array, "b t"] | Int[Array, "b 1"] | None,
    backend: AttentionBackend,
    rules: AxisRules | None,
) -> Float[Array, "b t n h"]:
    """Attention of each query over the first `kv_stop` of the F*P keys; arguments as of `attention`.

    With `act_context` on several devices whose number divides F, each device handles its own frames and the
    results are merged in float32. Otherwise this is `attention`.
    """
    shards = num_shards(rules, "act_context")
    if rules is None or shards == 1 or k.shape[1] % shards:
        k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
        return attention(q, k, v, kv_stop=kv_stop, backend=backend, rules=rules)
    stop = k.shape[1] * k.shape[2] if kv_stop is None else kv_stop
    kv_stop = jnp.broadcast_to(stop, q.shape[:2])
    batch = dividing_axes(rules, "act_batch", q.shape[0])
    heads = dividing_axes(rules, "act_heads", k.shape[3])
    frames = rules["act_context"]
    assert frames is not None  # more than one shard
    record_backend(q, k.shape[1] * k.shape[2], "blockwise")
    q_spec = PartitionSpec(batch, None, heads, None)
    kv_spec = PartitionSpec(batch, frames, None, heads, None)
    local = functools.partial(_attend_local, axis=frames)
    mapped = jax.shard_map(
        local,
        in_specs=(q_spec, kv_spec, kv_spec, PartitionSpec(batch, None)),
        out_specs=q_spec,
        check_vma=False,
    )
    return mapped(q, k, v, kv_stop)


def _attend_local(
    q: Array, k: Array, v: Array, kv_stop: Array, *, axis: str | tuple[str, ...]
) -> Float[Array, "b t n h"]:
    """Attention over the keys of one device, then the merge over the mesh axes `axis`."""
    k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
    stop = jnp.clip(kv_stop - jax.lax.axis_index(axis) * k.shape[1], 0, k.shape[1])
    out, lse = blockwise_attention(q, k, v, jnp.zeros_like(stop), stop, q.shape[-1] ** -0.5)
    maximum = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)
    weight = jnp.where(lse > MASKED / 2, jnp.exp(lse - maximum), 0.0)
    total = jax.lax.psum(weight, axis)
    merged = jax.lax.psum(weight[..., None] * out.astype(jnp.float32), axis)
    seen = total > 0
    return jnp.where(seen[..., None], merged / jnp.where(seen, total, 1.0)[..., None], 0.0).astype(q.dtype)
