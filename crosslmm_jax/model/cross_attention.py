"""Gated cross-attention to the original visual tokens (paper sec. 3.2 and 3.3, eq. 4-10).

One form serves both directions: V2V lets the compact visual tokens, T2V the text tokens, read all original
tokens. `x + tanh(gate) * Wo Attn(Wq norm(x), Wk norm(kv), Wv norm(kv))`, shaped like Qwen2's attention.
The norm of the original tokens does not depend on the layer but for its scale, so tokens arrive with unit
root mean square and the scale is folded into Wk and Wv: no normalised copy of all tokens a layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.attention import attention
from crosslmm_jax.model.blockwise import MASKED
from crosslmm_jax.model.context import context_parallel_attention
from crosslmm_jax.model.ops import rms_norm, rotate
from crosslmm_jax.model.partitioning import AxisRules
from crosslmm_jax.model.qwen2 import attention_weights
from crosslmm_jax.model.weights import Weight, WeightTable, constant, ones, stack


class KeysValues(NamedTuple):
    """Keys and values of all original tokens in one layer and direction, float[B, F, P, K, H] each."""

    keys: Float[Array, "b f p k h"]
    values: Float[Array, "b f p k h"]


def kv_width(config: ModelConfig) -> int:
    """Width of the original tokens that K/V are read from: projected (D) or straight from the encoder (W)."""
    cross = config.cross_attention
    return config.decoder.width if cross.kv_source == "projected" else config.vision.width


def cross_attention_weights(config: ModelConfig) -> WeightTable:
    """One direction's parameters, stacked over the decoder layers that carry cross-attention."""
    width, decoder = kv_width(config), config.decoder
    kv_embed = "embed" if width == decoder.width else "vision_embed"
    table = {
        "query_norm": Weight((decoder.width,), ("embed",), ones),
        "kv_norm": Weight((width,), (kv_embed,), ones),
        **attention_weights(decoder, width),
        "gate": Weight((), (), constant(config.cross_attention.gate_init)),
    }
    return stack(len(config.cross_attention_layers), table)


@jax.named_scope("keys_values")
def keys_values(
    weights: dict[str, Array], tokens: Float[Array, "b f p d"], *, config: ModelConfig
) -> KeysValues:
    """Keys and values of the original tokens float[B, F, P, D] (unit root mean square), for one layer."""
    batch, frames, patches, _ = tokens.shape
    scale = weights["kv_norm"].astype(tokens.dtype)[:, None, None]
    k = jnp.einsum("bfpd,dkh->bfpkh", tokens, scale * weights["wk"]) + weights["bk"]
    v = jnp.einsum("bfpd,dkh->bfpkh", tokens, scale * weights["wv"]) + weights["bv"]
    if config.cross_attention.cross_attn_rope == "time":
        times = jnp.broadcast_to(jnp.repeat(jnp.arange(frames), patches), (batch, frames * patches))
        flat = k.reshape(batch, frames * patches, *k.shape[3:])
        k = rotate(flat, times, theta=config.decoder.rope_theta).reshape(k.shape)
    return KeysValues(k, v)


def cross_attend(
    weights: dict[str, Array],
    x: Float[Array, "b t d"],
    kv: KeysValues,
    *,
    visible_frames: Int[Array, "b t"],
    times: Int[Array, "b t"],
    config: ModelConfig,
    scoped: bool = False,
    rules: AxisRules | None = None,
) -> Float[Array, "b t d"]:
    """The gated update of the tokens `x` (without the residual), exactly 0 for a token that sees no frame.

    Args:
      weights: one layer's, in the compute dtype (norms and gate float32).
      x: float[B, T, D], text tokens, or the F*C compact tokens in frame order.
      kv: keys and values of all F frames.
      visible_frames: int32[B, T], how many frames a token may read, from the first on.
      times: int32[B, T], a token's place on the frame axis: its frame, or for text the frames before it.
        Only the rotary embedding over time reads it.
      config: the whole model's.
      scoped: narrow what is read to `v2v_scope` (V2V only).
      rules: logical axes; frames may be spread over devices.

    Returns:
      float[B, T, D].
    """
    cross = config.cross_attention
    y = rms_norm(x, weights["query_norm"], config.decoder.rms_norm_eps)
    q = jnp.einsum("btd,dnh->btnh", y, weights["wq"]) + weights["bq"]
    if cross.cross_attn_rope == "time":
        q = rotate(q, times, theta=config.decoder.rope_theta)
    if scoped and cross.v2v_scope == "frame":
        out = _attend_frame(q, kv, visible_frames, config)
    elif scoped and cross.v2v_scope == "window":
        out = _attend_window(q, kv, visible_frames, config)
    else:
        stop = visible_frames * kv.keys.shape[2]
        out = context_parallel_attention(
            q, kv.keys, kv.values, kv_stop=stop, backend=config.attention, rules=rules
        )
    gate = jnp.tanh(weights["gate"].astype(jnp.float32)).astype(x.dtype)
    return gate * jnp.einsum("btnh,nhd->btd", out, weights["wo"])


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
    q = (jnp.einsum("bd,dnh->bnh", y, weights["wq"]) + weights["bq"])[:, None]
    if config.cross_attention.cross_attn_rope == "time":
        q = rotate(q, visible_frames[:, None], theta=config.decoder.rope_theta)
    batch, frames, _, kv_heads, size = kv.keys.shape
    q = q.astype(jnp.float32).reshape(batch, kv_heads, -1, size)
    scores = jnp.einsum("bkgh,bfpkh->bkgfp", q, kv.keys.astype(jnp.float32)) * size**-0.5
    seen = (jnp.arange(frames) < visible_frames[:, None])[:, None, None, :, None]
    scores = jnp.where(seen, scores, MASKED)
    probabilities = jnp.where(seen, jax.nn.softmax(scores, axis=(-2, -1)), 0.0)
    return jnp.mean(probabilities, axis=(1, 2))


def _attend_frame(
    q: Array, kv: KeysValues, visible_frames: Array, config: ModelConfig
) -> Float[Array, "b t n h"]:
    """Each compact token reads the patches of its own frame: linear in frames."""
    batch, frames, patches = kv.keys.shape[:3]
    by_frame = q.reshape(batch * frames, -1, *q.shape[2:])
    visible = visible_frames.reshape(batch, frames, -1) > jnp.arange(frames)[:, None]
    stop = jnp.where(visible, patches, 0).reshape(batch * frames, -1)
    keys, values = (x.reshape(batch * frames, patches, *x.shape[3:]) for x in kv)
    out = attention(by_frame, keys, values, kv_stop=stop, backend=config.attention)
    return out.reshape(q.shape)


def _attend_window(
    q: Array, kv: KeysValues, visible_frames: Array, config: ModelConfig
) -> Float[Array, "b t n h"]:
    """Each compact token reads the frames up to `v2v_window` before and after its own: linear in frames.

    Blocks of `window` frames read their own, the previous and the next block; ranges cut what is further.
    """
    batch, frames, patches = kv.keys.shape[:3]
    tokens = q.shape[1] // frames
    window = min(config.cross_attention.v2v_window, frames)
    count = -(-frames // window)
    pad = count * window - frames
    frame = jnp.repeat(jnp.arange(frames + pad), tokens).reshape(count, window * tokens)
    # Frames of the three blocks are counted from the first frame of the previous block.
    first = ((jnp.arange(count) - 1) * window)[:, None]
    low = jnp.maximum(frame - window, 0) - first
    seen = jnp.pad(visible_frames, ((0, 0), (0, pad * tokens))).reshape(batch, count, -1)
    high = jnp.minimum(jnp.minimum(frame + window + 1, frames), seen) - first
    low, high = jnp.broadcast_to(low, seen.shape), jnp.maximum(high, low)
    ranges = [(x * patches).reshape(batch * count, -1) for x in (low, high)]

    def three_blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (window, pad + window)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(batch, count + 2, window, *x.shape[2:])
        x = jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=2)
        return x.reshape(batch * count, 3 * window * patches, *x.shape[4:])

    q_blocks = jnp.pad(q, ((0, 0), (0, pad * tokens), (0, 0), (0, 0)))
    q_blocks = q_blocks.reshape(batch * count, window * tokens, *q.shape[2:])
    out = attention(
        q_blocks, three_blocks(kv.keys), three_blocks(kv.values),
        kv_start=ranges[0], kv_stop=ranges[1], backend=config.attention,
    )  # fmt: skip
    return out.reshape(batch, -1, *q.shape[2:])[:, : q.shape[1]]
