"""Gated cross-attention to the original visual tokens (paper sec. 3.2 and 3.3, eq. 4-10).

One form serves both directions: V2V lets the compact visual tokens, T2V the text tokens, read all original
tokens. `x + tanh(gate) * Wo Attn(Wq norm(x), Wk norm(kv), Wv norm(kv))`, shaped like Qwen2's attention.
The norm of the original tokens does not depend on the layer but for its scale, so tokens arrive with unit
root mean square and the scale is folded into Wk and Wv: no normalised copy of all tokens a layer.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.batch import AllOrNone, SamePerRow, VisibleFrames
from crosslmm_jax.config import ModelConfig, Precision
from crosslmm_jax.model.attention.blockwise import MASKED
from crosslmm_jax.model.ops import from_heads, pad_tokens, rms_norm, rotate, to_heads
from crosslmm_jax.model.params.partitioning import AxisRules
from crosslmm_jax.model.params.tables import Weight, WeightTable, constant, ones, stack
from crosslmm_jax.model.quantisation.quantise import DTYPES, quantise
from crosslmm_jax.model.qwen2 import attention_weights
from crosslmm_jax.model.video_attention import attend, attend_tokens


class KeysValues(NamedTuple):
    """Keys and values of all original tokens in one layer and direction, float[B, F, P, K, H] each.

    In 8 bits they come with a scale a head and channel, which goes into the queries and into what attention
    returns: all that is as long as the video is read as it is.
    """

    keys: Float[Array, "b f p k h"]
    values: Float[Array, "b f p k h"]
    key_scale: Float[Array, "b k h"] | None = None  # None: keys and values are in the compute dtype
    value_scale: Float[Array, "b k h"] | None = None


def kv_width(config: ModelConfig) -> int:
    """Width of the original tokens that K/V are read from: projected (D) or straight from the encoder (W)."""
    cross = config.cross_attention
    return config.decoder.width if cross.kv_source == "projected" else config.vision.width


def cross_attention_weights(config: ModelConfig, *, stacked: bool = True) -> WeightTable:
    """One direction's parameters, for all decoder layers that carry cross-attention."""
    width, decoder = kv_width(config), config.decoder
    kv_embed = "embed" if width == decoder.width else "vision_embed"
    table = {
        "query_norm": Weight((decoder.width,), ("embed",), ones),
        "kv_norm": Weight((width,), (kv_embed,), ones),
        **attention_weights(decoder, width),
        "gate": Weight((), (), constant(config.cross_attention.gate_init)),
    }
    return stack(len(config.cross_attention_layers), table, stacked=stacked)


@jax.named_scope("keys_values")
def keys_values(
    weights: dict[str, Array], tokens: Float[Array, "b f p d"], first: Array | int = 0, *, config: ModelConfig
) -> KeysValues:
    """Keys and values of the original tokens float[B, F, P, D] (unit root mean square), for one layer.

    `first` is the place of the first of these frames in the video.
    """
    batch, frames, patches, _ = tokens.shape
    scale = weights["kv_norm"].astype(tokens.dtype)[:, None, None]
    k, v = (to_heads(tokens, scale * weights["w" + name], weights["b" + name]) for name in "kv")
    if config.cross_attention.cross_attn_rope == "time":
        times = first + jnp.repeat(jnp.arange(frames), patches)
        times = jnp.broadcast_to(times, (batch, frames * patches))
        flat = k.reshape(batch, frames * patches, *k.shape[3:])
        k = rotate(flat, times, theta=config.decoder.rope_theta).reshape(k.shape)
    return KeysValues(k, v)


def compress(kv: KeysValues, precision: Precision) -> KeysValues:
    """`kv` as a cache holds it: as it is, or in 8 bits with float32 scales.

    What all keys of a head have in common, such as a large bias, moves all scores of a query alike; softmax
    does not see it, so it is taken off instead of being spent bits on. Values keep theirs.
    """
    if precision == "compute":
        return kv
    tokens, dtype = (1, 2), DTYPES[precision]
    keys = kv.keys.astype(jnp.float32)
    keys, key_scale = quantise(keys - jnp.mean(keys, axis=tokens, keepdims=True), dtype, tokens)
    values, value_scale = quantise(kv.values, dtype, tokens)
    return KeysValues(keys, values, jnp.squeeze(key_scale, tokens), jnp.squeeze(value_scale, tokens))


def _scaled(x: Float[Array, "b t n h"], scale: Float[Array, "b k h"] | None) -> Float[Array, "b t n h"]:
    """Queries, or what they have read, times the scale of the keys or values that they read."""
    if scale is None:
        return x
    groups = x.reshape(*x.shape[:2], scale.shape[1], -1, x.shape[3])
    return (groups.astype(jnp.float32) * scale[:, None, :, None]).astype(x.dtype).reshape(x.shape)


def cross_attend(
    weights: dict[str, Array],
    x: Float[Array, "b r d"],
    source: KeysValues | Float[Array, "b f p d"],
    *,
    visible_frames: VisibleFrames,
    times: Int[Array, "b t"],
    config: ModelConfig,
    scoped: bool = False,
    rules: AxisRules | None = None,
) -> Float[Array, "b r d"]:
    """The gated update of the tokens `x` (without the residual), exactly 0 for a token that sees no frame.

    Args:
      weights: one layer's, in the compute dtype (norms and gate float32).
      x: float[B, R, D], T text tokens and padding behind them (`with_fewest_rows`), or the F*C compact tokens
        in frame order.
      source: keys and values of all F frames, or the original tokens that they are made from on the way:
        for a long video not all at once (`frame_parts`).
      visible_frames: of the T tokens; `SamePerRow` not with `scoped`.
      times: int32[B, T], a token's place on the frame axis: its frame, or for text the frames before it.
        Only the rotary embedding over time reads it.
      config: the whole model's.
      scoped: narrow what is read to `v2v_scope` (V2V only).
      rules: logical axes; frames may be spread over devices.

    Returns:
      float[B, R, D], 0 for padding.
    """
    cross = config.cross_attention
    y = rms_norm(x, weights["query_norm"], config.decoder.rms_norm_eps)
    q = to_heads(y, weights["wq"], weights["bq"])[:, : visible_frames.counts.shape[1]]
    if cross.cross_attn_rope == "time":
        q = rotate(q, times, theta=config.decoder.rope_theta)
    all_or_none = isinstance(visible_frames, AllOrNone)
    limits = None if all_or_none else visible_frames.counts
    if isinstance(visible_frames, SamePerRow):
        limits = visible_frames.counts[:, :1]
    same = {"visible_frames": limits, "config": config, "scoped": scoped, "rules": rules}
    if isinstance(source, KeysValues):
        out = _scaled(attend(_scaled(q, source.key_scale), source, **same), source.value_scale)
    else:
        out = attend_tokens(q, weights, source, make=functools.partial(keys_values, config=config), **same)
    if all_or_none:
        out = jnp.where((visible_frames.counts > 0)[:, :, None, None], out, 0)
    gate = jnp.tanh(weights["gate"].astype(jnp.float32)).astype(x.dtype)
    return gate * from_heads(pad_tokens(out, x.shape[1]), weights["wo"])


def attention_map(
    weights: dict[str, Array],
    x: Float[Array, "b d"],
    kv: KeysValues,
    *,
    visible_frames: Int[Array, " b"],
    config: ModelConfig,
) -> Float[Array, "b f p"]:
    """float32[B, F, P] probabilities with which one text token a row reads each patch, mean over heads."""
    y = rms_norm(x, weights["query_norm"], config.decoder.rms_norm_eps)
    q = to_heads(y, weights["wq"], weights["bq"])[:, None]
    if config.cross_attention.cross_attn_rope == "time":
        q = rotate(q, visible_frames[:, None], theta=config.decoder.rope_theta)
    batch, frames, _, kv_heads, size = kv.keys.shape
    q = _scaled(q.astype(jnp.float32), kv.key_scale).reshape(batch, kv_heads, -1, size)
    scores = jnp.einsum("bkgh,bfpkh->bkgfp", q, kv.keys.astype(jnp.float32)) * size**-0.5
    seen = (jnp.arange(frames) < visible_frames[:, None])[:, None, None, :, None]
    scores = jnp.where(seen, scores, MASKED)
    probabilities = jnp.where(seen, jax.nn.softmax(scores, axis=(-2, -1)), 0.0)
    return jnp.mean(probabilities, axis=(1, 2))
