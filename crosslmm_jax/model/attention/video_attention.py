"""Attention to the original tokens of a video, without keys and values of all heads at once if it is long.

Keys and values of one layer and direction are made at once where they are small. Those of a long video never
exist all at once:

- `v2v_scope` "frame" and "window": they are made and used for one chunk of frames at a time.
- all frames: for one key head at a time. No partial results are merged, so any attention backend will do.

Both are exact. Memory of a prefill of the 2B model at 9 tokens per frame over its weights, in GB of bfloat16:

    frames                             4,096      8,192     16,384    bytes
    pixels (input)                       1.8        3.6        7.2    F R R 3
    original tokens                      9.2       18.3       36.7    F P D 2
    V2V: keys and values of a head       1.5        3.1        6.1    F P H 4
         queries, hidden states          0.6        1.1        2.3    5 F C D 2
    or MLP: hidden units                 2.0        4.0        7.9    3 F C M 2
         hidden states                   0.2        0.5        0.9    2 F C D 2
    sum, with the larger                13.2       26.4       52.7    + 4.0 of weights: fits 80 GB

All keys and values at once would take 3.1, 6.1 and 12.2 GB; those of "window" (each frame's in three blocks)
three times that. T2V's of seven layers, which decoding keeps, take 21, 43 and 86 GB: with them 8,192 frames
fit 80 GB, and 16,384 do not fit 141 GB.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.attention.context_parallel import context_parallel_attention
from crosslmm_jax.model.attention.dispatch import attention
from crosslmm_jax.model.kv_cache import KeysValues
from crosslmm_jax.model.params.low_rank import heads_first, with_head
from crosslmm_jax.model.params.partitioning import AxisRules, num_shards

# Keys and values of one layer and direction on one device: up to this size they are made at once.
MAX_WHOLE_KV_BYTES = 2**30
# Else, and with a `v2v_scope` of some frames: size of the keys and values of one chunk of frames.
CHUNK_BYTES = 2**28


# See `make_kv` of `attend_tokens`.
MakeKeysValues = Callable[[dict[str, Array], Array, Array | int], KeysValues]


def attend_tokens(
    q: Float[Array, "b t n h"],
    weights: dict[str, Array],
    tokens: Float[Array, "b f p d"],
    *,
    make_kv: MakeKeysValues,
    visible_frames: Int[Array, "b t"] | Int[Array, "b 1"] | None,
    config: ModelConfig,
    scoped: bool,
    first: Array | int | None = None,
    rules: AxisRules | None,
) -> Float[Array, "b t n h"]:
    """Attention to keys and values that are made from the original tokens on the way.

    Args:
      q: queries; with `scoped` those of the F*C compact tokens in frame order, or of some frames' from
        `first` on.
      weights: one layer's and direction's; only those of keys and values are used.
      tokens: the original tokens.
      make_kv: (weights of some or all K key heads, float[B, f, P, D] tokens of f frames, number of the first
        of these frames) -> their keys and values, float[B, f, P, k, H] for k key heads.
      visible_frames: number of frames that each query sees, from the first on; [B, 1] for all queries of a
        row (not with `scoped`); None: all frames.
      config: the model configuration.
      scoped: narrow the frames that are read to `v2v_scope`.
      first: with `scoped`, the frame of the first query; None: the queries are of all frames.
      rules: logical axis -> mesh axes; frames or heads that are sharded are small enough on each device.
    """
    frames, narrow = tokens.shape[1], scoped and config.cross_attention.v2v_scope != "video"
    same = {"config": config, "rules": rules}
    if narrow and first is not None:
        return _of_frames(q, weights, tokens, make_kv, visible_frames, first, **same)
    if not makes_kv_in_chunks(tokens, narrow=narrow, **same):
        kv = make_kv(weights, tokens, 0)
        return attend(q, kv, visible_frames=visible_frames, scoped=scoped, **same)
    count = min(-(-_kv_bytes(tokens, **same) // CHUNK_BYTES), frames)
    split = _by_frame_chunk if narrow else _by_head
    return split(q, weights, tokens, make_kv, visible_frames, -(-frames // count), **same)


def makes_kv_in_chunks(
    tokens: Array, *, config: ModelConfig, rules: AxisRules | None, narrow: bool = False
) -> bool:
    """Whether keys and values of these original tokens are not made at once.

    Args:
      tokens: float[B, F, P, D].
      config: the model configuration.
      rules: logical axis -> mesh axes. Sharded frames are not split further. With sharded heads, chunks
        of frames are possible, but not one head at a time.
      narrow: a query reads the frames around its own only.
    """
    if num_shards(rules, "act_context") > 1 or (num_shards(rules, "act_heads") > 1 and not narrow):
        return False
    return _kv_bytes(tokens, config, rules) > (CHUNK_BYTES if narrow else MAX_WHOLE_KV_BYTES)


def _kv_bytes(tokens: Array, config: ModelConfig, rules: AxisRules | None) -> int:
    """Bytes of the keys and values of `tokens` on one device."""
    batch, frames, patches, _ = tokens.shape
    rows = max(1, batch // num_shards(rules, "act_batch"))
    decoder = config.decoder
    shards = num_shards(rules, "act_heads")
    heads = decoder.num_kv_heads // (shards if decoder.num_kv_heads % shards == 0 else 1)
    return 2 * rows * frames * patches * heads * decoder.head_dim * tokens.dtype.itemsize


def attend(
    q: Float[Array, "b t n h"],
    kv: KeysValues,
    *,
    visible_frames: Int[Array, "b t"] | Int[Array, "b 1"] | None,
    config: ModelConfig,
    scoped: bool,
    rules: AxisRules | None,
) -> Float[Array, "b t n h"]:
    """Attention to keys and values; arguments as of `attend_tokens`."""
    scope = config.cross_attention.v2v_scope if scoped else "video"
    if scope == "frame":
        return _attend_frame(q, kv, visible_frames, config, rules)
    if scope == "window":
        return _attend_window(q, kv, visible_frames, 0, config, rules)
    stop = None if visible_frames is None else visible_frames * kv.keys.shape[2]
    return context_parallel_attention(
        q, kv.keys, kv.values, kv_stop=stop, backend=config.attention, rules=rules
    )


def _attend_frame(
    q: Array, kv: KeysValues, visible_frames: Array | None, config: ModelConfig, rules: AxisRules | None
) -> Float[Array, "b t n h"]:
    """Each compact token reads the patches of its frame: linear in frames."""
    batch, frames, patches = kv.keys.shape[:3]
    by_frame = q.reshape(batch * frames, -1, *q.shape[2:])
    stop = None
    if visible_frames is not None:
        visible = visible_frames.reshape(batch, frames, -1) > jnp.arange(frames)[:, None]
        stop = jnp.where(visible, patches, 0).reshape(batch * frames, -1)
    keys, values = (x.reshape(batch * frames, patches, *x.shape[3:]) for x in (kv.keys, kv.values))
    out = attention(by_frame, keys, values, kv_stop=stop, backend=config.attention, rules=rules)
    return out.reshape(q.shape)


def _attend_window(
    q: Array,
    kv: KeysValues,
    visible_frames: Array | None,
    offset: Array | int,
    config: ModelConfig,
    rules: AxisRules | None,
) -> Float[Array, "b t n h"]:
    """Each compact token reads the frames up to `v2v_window` before and after its own: linear in frames.

    A block of `window` frames reads itself, the block before and the block after; ranges exclude what is
    further away. Frames are counted from the first in `kv`; `offset` is the first in `q`.
    """
    batch, frames, patches = kv.keys.shape[:3]
    tokens = config.merge.tokens_per_frame
    query_frames = q.shape[1] // tokens
    window = min(config.cross_attention.v2v_window, frames)
    count = -(-query_frames // window)
    pad = count * window - query_frames
    frame = offset + jnp.repeat(jnp.arange(query_frames + pad), tokens).reshape(count, window * tokens)
    # Within a block, frames are counted from the first one of the previous block.
    first = offset + ((jnp.arange(count) - 1) * window)[:, None]
    low = jnp.maximum(frame - window, 0) - first
    if visible_frames is None:
        visible_frames = jnp.full((batch, query_frames * tokens), frames, jnp.int32)
    seen = jnp.pad(visible_frames, ((0, 0), (0, pad * tokens))).reshape(batch, count, -1)
    high = jnp.minimum(jnp.minimum(frame + window + 1, frames), seen) - first
    low, high = jnp.broadcast_to(low, seen.shape), jnp.maximum(high, low)
    ranges = [(x * patches).reshape(batch * count, -1) for x in (low, high)]

    def three_blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (window, pad + window)) + ((0, 0),) * (x.ndim - 2))
        x = jax.lax.dynamic_slice_in_dim(x, offset, (count + 2) * window, axis=1)
        x = x.reshape(batch, count + 2, window, *x.shape[2:])
        x = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)
        return x.reshape(batch * count, 3 * window * patches, *x.shape[4:])

    q_blocks = jnp.pad(q, ((0, 0), (0, pad * tokens), (0, 0), (0, 0)))
    q_blocks = q_blocks.reshape(batch * count, window * tokens, *q.shape[2:])
    out = attention(
        q_blocks, three_blocks(kv.keys), three_blocks(kv.values),
        kv_start=ranges[0], kv_stop=ranges[1], backend=config.attention, rules=rules,
    )  # fmt: skip
    return out.reshape(batch, -1, *q.shape[2:])[:, : q.shape[1]]


def _begins(frames: int, size: int) -> Array:
    """First frames of the chunks; the last chunk is moved back to end with the last frame."""
    return jnp.minimum(jnp.arange(-(-frames // size)) * size, frames - size)


def _by_frame_chunk(
    q: Array, weights: dict[str, Array], tokens: Array, make_kv: MakeKeysValues, visible_frames: Array | None,
    size: int, config: ModelConfig, rules: AxisRules | None,
) -> Float[Array, "b t n h"]:  # fmt: skip
    """`v2v_scope` "frame" or "window" for `size` frames at a time."""
    frames, c = tokens.shape[1], config.merge.tokens_per_frame

    def one(begin: Array) -> Array:
        queries = jax.lax.dynamic_slice_in_dim(q, begin * c, size * c, axis=1)
        visible = visible_frames
        if visible is not None:
            visible = jax.lax.dynamic_slice_in_dim(visible, begin * c, size * c, axis=1)
        return _of_frames(queries, weights, tokens, make_kv, visible, begin, config, rules)

    begins = _begins(frames, size)
    out = jax.lax.map(jax.checkpoint(one, prevent_cse=False), begins)
    again = (len(begins) * size - frames) * c  # tokens at the end of the last chunk but one, computed twice
    before = jnp.moveaxis(out[:-1], 0, 1).reshape(q.shape[0], -1, *q.shape[2:])
    return jnp.concatenate([before, out[-1][:, again:]], axis=1)


def _of_frames(
    q: Array, weights: dict[str, Array], tokens: Array, make_kv: MakeKeysValues, visible_frames: Array | None,
    begin: Array | int, config: ModelConfig, rules: AxisRules | None,
) -> Float[Array, "b t n h"]:  # fmt: skip
    """`v2v_scope` "frame" or "window" for the compact tokens of some frames, from frame `begin` on."""
    frames, cross = tokens.shape[1], config.cross_attention
    beside = cross.v2v_window if cross.v2v_scope == "window" else 0
    read = min(frames, q.shape[1] // config.merge.tokens_per_frame + 2 * beside)
    first = jnp.clip(begin - beside, 0, frames - read)
    visible = None if visible_frames is None else visible_frames - first
    kv = make_kv(weights, jax.lax.dynamic_slice_in_dim(tokens, first, read, axis=1), first)
    if cross.v2v_scope == "frame":
        return _attend_frame(q, kv, visible, config, rules)
    return _attend_window(q, kv, visible, begin - first, config, rules)


def _by_head(
    q: Array, weights: dict[str, Array], tokens: Array, make_kv: MakeKeysValues, visible_frames: Array | None,
    size: int, config: ModelConfig, rules: AxisRules | None,
) -> Float[Array, "b t n h"]:  # fmt: skip
    """All frames, for one key head and its queries at a time.

    Keys and values of a head are made for `size` frames at a time, in matrix products of ordinary size.
    """
    batch, frames, patches, _ = tokens.shape
    heads, head_dim = config.decoder.num_kv_heads, q.shape[3]
    by_head = {name: heads_first(weights[name]) for name in ("wk", "wv")}
    by_head |= {name: weights[name] for name in ("bk", "bv")}
    stop = None if visible_frames is None else visible_frames * patches

    def one(head: tuple[Array, dict[str, Array]]) -> Array:
        q, head_weights = head
        expanded: PyTree = {name: with_head(head_weights[name]) for name in ("wk", "wv")}
        expanded |= {name: head_weights[name][None] for name in ("bk", "bv")}

        def add(kv: tuple[Array, ...], begin: Array) -> tuple[tuple[Array, ...], None]:
            chunk = jax.lax.dynamic_slice_in_dim(tokens, begin, size, axis=1)
            made = make_kv(weights | expanded, chunk, begin)
            pairs = zip(kv, (made.keys, made.values), strict=True)
            return tuple(jax.lax.dynamic_update_slice_in_dim(x, new, begin, axis=1) for x, new in pairs), None

        none = jnp.zeros((batch, frames, patches, 1, head_dim), tokens.dtype)
        # Recomputed too: the scan would keep the tokens of all its chunks, a copy of the whole video.
        add_again = jax.checkpoint(add, prevent_cse=False)
        (k, v), _ = jax.lax.scan(add_again, (none, none), _begins(frames, size))
        k, v = (x.reshape(batch, -1, 1, head_dim) for x in (k, v))
        return attention(q, k, v, kv_stop=stop, backend=config.attention, rules=rules)

    groups = jnp.moveaxis(q.reshape(*q.shape[:2], heads, -1, head_dim), 2, 0)
    out = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (groups, by_head))
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)
