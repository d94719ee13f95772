"""One decoder layer: Qwen2's, with both directions of cross-attention between its halves (paper fig. 2)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.batch import Batch, VisibleFrames, VisualOnly
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.cross_attention import (
    KeysValues,
    attention_map,
    compress,
    cross_attend,
    keys_values,
)
from crosslmm_jax.model.encode_frames import Visual
from crosslmm_jax.model.ops import add_at, gather_tokens
from crosslmm_jax.model.params.partitioning import AxisRules, constrain
from crosslmm_jax.model.params.tables import cast
from crosslmm_jax.model.qwen2 import LayerCache, mlp, self_attention
from crosslmm_jax.model.video_attention import is_long


def decoder_layer(
    x: Float[Array, "b r d"],
    weights: dict[str, Array],
    cross: dict[str, dict[str, Array]] | None,
    *,
    positions: Int[Array, "b t"],
    visible_frames: VisibleFrames,
    own: LayerCache | None = None,
    visual: Visual | None = None,
    batch: Batch | None = None,
    t2v: KeysValues | None = None,
    observed: Int[Array, " b"] | None = None,
    config: ModelConfig,
    rules: AxisRules | None = None,
) -> tuple[Array, Array, Array, Any]:
    """Self-attention, cross-attention where `cross` has its weights, MLP.

    Args:
      x: float[B, R, D]: R = T, or text behind a cache with padding (`with_fewest_rows`).
      weights: one layer's.
      cross: its cross-attention's, a direction each.
      positions: int32[B, T].
      visible_frames: of all T tokens.
      own: self-attention's cache: `x` is text behind it.
      visual: the video, when `x` is a whole sequence.
      batch: the same, with the sequence's slots.
      t2v: cached keys and values of the video, when `x` is text behind a cache.
      observed: int32[B], the token in each row whose attention map is asked for.
      config: the whole model's.
      rules: logical axes.

    Returns:
      float[B, R, D], self-attention's keys and values, and what cross-attention leaves: T2V's keys and
      values of a whole sequence, the attention maps of the tokens at `observed`, or None.
    """
    c, dtype = config, jnp.dtype(config.compute_dtype)
    weights, left = cast(weights, dtype), None
    x, keys, values = self_attention(
        weights, x, positions, config=c.decoder, backend=c.attention, cache=own, rules=rules
    )
    if cross is not None:
        cross = {direction: cast(part, dtype) for direction, part in cross.items()}
        if visual is not None and batch is not None:
            x, left = _dual_cross_attention(x, cross, visual, batch, c, rules)
        elif t2v is not None and "t2v" in cross:
            x, left = _text_to_visual(x, cross["t2v"], t2v, visible_frames, observed, c, rules)
    x = constrain(mlp(weights, x, config=c.decoder), rules, "act_batch", "act_len", "act_embed")
    return x, keys, values, left


def _dual_cross_attention(
    x: Array,
    cross: dict[str, Any],
    visual: Visual,
    batch: Batch,
    config: ModelConfig,
    rules: AxisRules | None,
) -> tuple[Array, KeysValues | None]:
    """Both directions in parallel: each reads the hidden states that self-attention left."""
    c, frames = config, visual.originals.shape[1]
    if frames == 0:
        return x, None
    visible, out, t2v = batch.visible_frames, x, None
    if "v2v" in cross:
        with jax.named_scope("v2v"):
            slots = batch.visual_slots
            frame = jnp.repeat(jnp.arange(frames), c.merge.tokens_per_frame)
            # One layer's and one direction's keys and values at a time: no earlier than `x` is there.
            x, originals = jax.lax.optimization_barrier((x, visual.originals))
            update = cross_attend(
                cross["v2v"], gather_tokens(x, slots), originals,
                visible_frames=_visible_at(visible, slots), times=jnp.broadcast_to(frame, slots.shape),
                config=c, scoped=True, rules=rules,
            )  # fmt: skip
            out = add_at(out, slots, update)
    if "t2v" in cross:
        with jax.named_scope("t2v"):
            slots = batch.text_slots
            out, originals = jax.lax.optimization_barrier((out, visual.originals))
            t2v = keys_values(cross["t2v"], originals, config=c)
            if not isinstance(visible, VisualOnly):
                seen = _visible_at(visible, slots)
                # Of a long video, `t2v` is for the cache alone: what is read here is made part by part.
                source = originals if is_long(originals, config=c, rules=rules) else t2v
                update = cross_attend(
                    cross["t2v"], gather_tokens(x, slots), source,
                    visible_frames=seen, times=seen.counts, config=c, rules=rules,
                )  # fmt: skip
                out = add_at(out, slots, update)
            t2v = compress(t2v, c.cross_attention.cache_dtype)
    return out, t2v


def _visible_at(visible: VisibleFrames, slots: Array) -> VisibleFrames:
    return visible._replace(counts=jnp.take_along_axis(visible.counts, slots, axis=1))


def _text_to_visual(
    x: Array,
    weights: dict[str, Array],
    kv: KeysValues,
    visible_frames: VisibleFrames,
    observed: Array | None,
    config: ModelConfig,
    rules: AxisRules | None,
) -> tuple[Array, Array | None]:
    """T2V from cached keys and values, and the attention maps of the tokens at `observed`."""
    maps = None
    if observed is not None:
        token = gather_tokens(x, observed[:, None])[:, 0]
        maps = attention_map(weights, token, kv, visible_frames=visible_frames.counts[:, 0], config=config)
    with jax.named_scope("t2v"):
        update = cross_attend(
            weights, x, kv, visible_frames=visible_frames, times=visible_frames.counts, config=config,
            rules=rules,
        )  # fmt: skip
    return x + update, maps
