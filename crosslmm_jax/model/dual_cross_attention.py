"""Dual cross-attention to the original visual tokens, gated (paper sec. 3.2 and 3.3, eq. 4-10).

V2V lets the compact visual tokens read all original tokens, T2V the text tokens. Both directions have one
form, shaped like Qwen2's attention, and weights of their own:

    x + tanh(gate) * Wo Attn(Wq norm(x), Wk norm(kv), Wv norm(kv))

| equation | V2V | T2V | here |
|---|---|---|---|
| I' = LayerNorm(SelfAttn(I) + I) | (4) | (4) | `x` after self-attention; the norm, `query_norm`, only in Q |
| Q = Wq I' | (5) | (8) | `cross_attend`: of compact tokens in V2V, of text tokens in T2V |
| K, V = (Wk / Wv) V | (6) | (9) | `keys_values` of the original tokens |
| I' = I' + gate * Attn(Q, K, V) | (7) | (10) | `cross_attend` returns the update; callers add it to `x` |

The norm of the original tokens is the same in every layer but for its scale. So tokens come with unit root
mean square and the scale is folded into Wk and Wv: no layer holds a normalised copy of all tokens.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.batch import AllOrNone, Batch, RowOrNone, SamePerRow, VisibleFrames, VisualOnly
from crosslmm_jax.config import ModelConfig, Precision
from crosslmm_jax.model.attention.blockwise import MASKED
from crosslmm_jax.model.attention.dispatch import named_attention
from crosslmm_jax.model.attention.video_attention import attend, attend_tokens, makes_kv_in_chunks
from crosslmm_jax.model.encode_frames import Appended, Visual
from crosslmm_jax.model.kv_cache import KeysValues
from crosslmm_jax.model.ops import (
    Rotary,
    add_at,
    from_heads,
    gather_tokens,
    pad_tokens,
    rms_norm,
    rotate,
    to_heads,
)
from crosslmm_jax.model.params.low_rank import scale_inputs
from crosslmm_jax.model.params.partitioning import AxisRules
from crosslmm_jax.model.params.tables import Weight, WeightTable, constant, declare, ones, stack
from crosslmm_jax.model.quantisation.quantise import DTYPES, quantise, quantise_at, scale_for
from crosslmm_jax.model.qwen2 import attention_weights

CHUNK_FRAMES = 64  # of `compressed_in_chunks`

# Direction -> weights of one layer, in the compute dtype (norms and gates float32).
CrossWeights = dict[str, dict[str, Array]]


class DualCrossAttention(nn.Module):
    """V2V and T2V of all decoder layers that carry them.

    Attributes:
      config: the model configuration; `cross_attention.directions` says which directions are in the graph.
      rules: logical axis -> mesh axes.
      stacked: layers in one array per parameter, or separate.
    """

    config: ModelConfig
    rules: AxisRules | None = None
    stacked: bool = True

    def setup(self) -> None:
        """Declares the parameters."""
        self.v2v = _Direction(self.config, self.stacked)
        self.t2v = _Direction(self.config, self.stacked)

    def declare(self) -> None:
        """Touches every parameter, those of directions that are not in the graph included."""
        for direction in (self.v2v, self.t2v):
            direction()

    def weights(self) -> dict[str, dict[str, Array]]:
        """Weights of all layers for each direction in the graph."""
        return {direction: getattr(self, direction)() for direction in self.config.cross_attention.directions}

    def over_prompt(
        self, weights: CrossWeights, x: Float[Array, "b t d"], batch: Batch[Array], visual: Visual
    ) -> tuple[Float[Array, "b t d"], KeysValues | None]:
        """Both directions in parallel over a prompt: each reads the hidden states after self-attention.

        Args:
          weights: one layer's.
          x: hidden states of all T tokens, compact ones included.
          batch: the prompt.
          visual: its video.

        Returns:
          The hidden states, and T2V's keys and values for the KV cache; None without T2V or frames.
        """
        c, frames, visible = self.config, visual.originals.shape[1], batch.visible_frames
        if frames == 0:
            return x, None
        out, kv = x, None
        if "v2v" in weights:
            with named_attention("v2v"):
                slots = batch.visual_slots
                frame = jnp.repeat(jnp.arange(frames), c.merge.tokens_per_frame)
                # One layer's and one direction's keys and values at a time: no earlier than `x` is there.
                x, originals = jax.lax.optimization_barrier((x, visual.originals))
                update = cross_attend(
                    weights["v2v"], gather_tokens(x, slots), originals,
                    visible_frames=_visible_at(visible, slots), times=jnp.broadcast_to(frame, slots.shape),
                    config=c, scoped=True, rules=self.rules,
                )  # fmt: skip
                out = add_at(out, slots, update)
        if "t2v" in weights:
            with named_attention("t2v"):
                slots = batch.text_slots
                out, originals = jax.lax.optimization_barrier((out, visual.originals))
                if not makes_kv_in_chunks(originals, config=c, rules=self.rules):
                    kv = keys_values(weights["t2v"], originals, config=c)
                if not isinstance(visible, VisualOnly):
                    seen = _visible_at(visible, slots)
                    # Of a long video, what is read here is made in pieces.
                    update = cross_attend(
                        weights["t2v"], gather_tokens(x, slots), originals if kv is None else kv,
                        visible_frames=seen, times=seen.counts, config=c, rules=self.rules,
                    )  # fmt: skip
                    out = add_at(out, slots, update)
                real = None if isinstance(visible, AllOrNone) else jnp.max(visible.counts, axis=1)
                kv = video_cache(weights["t2v"], originals, kv, real, config=c)
        return out, kv

    def over_frames(
        self, weights: CrossWeights, x: Float[Array, "b u d"], kv: KeysValues | None, appended: Appended
    ) -> tuple[Float[Array, "b u d"], KeysValues | None]:
        """V2V of frames that come after a KV cache, and T2V's keys and values with theirs.

        Args:
          weights: one layer's.
          x: hidden states of the n*C new compact tokens and padding, U >= n*C.
          kv: T2V's part of the cache, with room for the new frames; None without T2V.
          appended: the new frames.
        """
        c, first, counts = self.config, appended.first, appended.visible_frames.counts
        if "v2v" in weights:
            with named_attention("v2v"):
                frame = first + jnp.arange(counts.shape[1]) // c.merge.tokens_per_frame
                x = x + cross_attend(
                    weights["v2v"], x, appended.originals, visible_frames=appended.visible_frames,
                    times=jnp.broadcast_to(frame, counts.shape), config=c, scoped=True, first=first,
                    rules=self.rules,
                )  # fmt: skip
        if "t2v" in weights and kv is not None:
            with named_attention("t2v"):
                size = counts.shape[1] // c.merge.tokens_per_frame
                new = jax.lax.dynamic_slice_in_dim(appended.originals, first, size, axis=1)
                kv = kv.written(keys_values(weights["t2v"], new, config=c, first=first), first)
        return x, kv

    def over_text(
        self, weights: CrossWeights, x: Float[Array, "b u d"], kv: KeysValues, visible_frames: SamePerRow
    ) -> Float[Array, "b u d"]:
        """T2V over text after a KV cache.

        Args:
          weights: one layer's.
          x: hidden states of T text tokens and padding, U >= T (`with_fewest_rows`).
          kv: of the cache; with fewer rows than `x`, each row is read by B / rows neighbouring rows of `x`.
          visible_frames: int32[B, T].
        """
        with named_attention("t2v"):
            return x + cross_attend(
                weights["t2v"], x, kv, visible_frames=visible_frames, times=visible_frames.counts,
                config=self.config, rules=self.rules,
            )  # fmt: skip


class _Direction(nn.Module):
    """Parameters of V2V or of T2V."""

    config: ModelConfig
    stacked: bool

    def setup(self) -> None:
        self.parameters = declare(self, cross_attention_weights(self.config, stacked=self.stacked))

    def __call__(self) -> dict[str, Array]:
        return dict(self.parameters)


def kv_width(config: ModelConfig) -> int:
    """Width of the original tokens that K/V are made from: projected (D) or straight from the encoder (W)."""
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


def _rotary_of_time(config: ModelConfig) -> Rotary:
    """The rotary embedding over the frame index. YaRN scales positions of the decoder, not frames."""
    return Rotary.of(config.decoder.rope_theta, config.decoder.head_dim)


@jax.named_scope("keys_values")
def keys_values(
    weights: dict[str, Array], tokens: Float[Array, "b f p d"], first: Array | int = 0, *, config: ModelConfig
) -> KeysValues:
    """Keys and values of the original tokens (unit root mean square) for one layer and direction.

    `first` is the number of the first of these frames in the video.
    """
    batch, frames, patches, _ = tokens.shape
    scale = weights["kv_norm"].astype(tokens.dtype)
    k, v = (to_heads(tokens, scale_inputs(weights["w" + name], scale), weights["b" + name]) for name in "kv")
    if config.cross_attention.cross_attn_rope == "time":
        times = first + jnp.repeat(jnp.arange(frames), patches)
        times = jnp.broadcast_to(times, (batch, frames * patches))
        flat = k.reshape(batch, frames * patches, *k.shape[3:])
        k = rotate(flat, times, _rotary_of_time(config)).reshape(k.shape)
    return KeysValues(k, v)


def compress(kv: KeysValues, precision: Precision, num_frames: Int[Array, " b"] | None = None) -> KeysValues:
    """`kv` as a cache stores it: unchanged, or in 8 bits with float32 scales.

    What all keys of a head have in common, such as a large bias, shifts all scores of a query alike. Softmax
    does not see it, so it is subtracted instead of costing bits. Values keep theirs.

    `num_frames` are the frames of each row without the padded ones, which no scale may depend on; None: all.
    """
    if precision == "compute":
        return kv
    tokens, dtype, frames = (1, 2), DTYPES[precision], kv.keys.shape[1]
    real = None
    if num_frames is not None:
        real = (jnp.arange(frames) < num_frames[:, None])[:, :, None, None, None]
    keys = kv.keys.astype(jnp.float32)
    keys = keys - jnp.mean(keys, axis=tokens, keepdims=True, where=real)
    keys, values = (x if real is None else jnp.where(real, x, 0) for x in (keys, kv.values))
    keys, key_scale = quantise(keys, dtype, tokens)
    values, value_scale = quantise(values, dtype, tokens)
    return KeysValues(keys, values, jnp.squeeze(key_scale, tokens), jnp.squeeze(value_scale, tokens))


def video_cache(
    weights: dict[str, Array],
    tokens: Float[Array, "b f p d"],
    kv: KeysValues | None,
    num_frames: Int[Array, " b"] | None,
    *,
    config: ModelConfig,
) -> KeysValues:
    """One layer's part of the video KV cache, in the precision that the configuration asks for.

    Args:
      weights: one layer's.
      tokens: the original tokens.
      kv: their keys and values, if they were made; None for a long video.
      num_frames: of each row without the padded ones; None: all.
      config: the model configuration.
    """
    precision = config.cross_attention.cache_dtype
    if kv is not None:
        return compress(kv, precision, num_frames)
    if precision == "compute":
        return keys_values(weights, tokens, config=config)
    return compressed_in_chunks(weights, tokens, precision, num_frames, config=config)


def compressed_in_chunks(
    weights: dict[str, Array],
    tokens: Float[Array, "b f p d"],
    precision: Precision,
    num_frames: Int[Array, " b"] | None,
    *,
    config: ModelConfig,
) -> KeysValues:
    """`compress` of `keys_values`, which are made twice, for some frames at a time.

    A first pass finds the scales, a second one writes 8 bits. So a long video's keys and values never exist
    in the compute dtype.
    """
    (batch, frames, patches, _), dtype = tokens.shape, DTYPES[precision]
    heads = (config.decoder.num_kv_heads, config.decoder.head_dim)
    size = math.gcd(frames, CHUNK_FRAMES)
    limits = jnp.full(batch, frames) if num_frames is None else num_frames
    axes = (1, 2)

    def chunk(begin: Array) -> tuple[Array, Array, Array]:
        kv = keys_values(
            weights, jax.lax.dynamic_slice_in_dim(tokens, begin, size, axis=1), config=config, first=begin
        )
        real = (begin + jnp.arange(size) < limits[:, None])[:, :, None, None, None]
        return kv.keys.astype(jnp.float32), kv.values.astype(jnp.float32), real

    def measure(carry: tuple[Array, ...], begin: Array) -> tuple[tuple[Array, ...], None]:
        total, high, low, most = carry
        keys, values, real = chunk(begin)
        total = total + jnp.sum(keys, axes, where=real, keepdims=True)
        high = jnp.maximum(high, jnp.max(keys, axes, where=real, initial=-jnp.inf, keepdims=True))
        low = jnp.minimum(low, jnp.min(keys, axes, where=real, initial=jnp.inf, keepdims=True))
        most = jnp.maximum(most, jnp.max(jnp.abs(values), axes, where=real, initial=0, keepdims=True))
        return (total, high, low, most), None

    begins, zeros = jnp.arange(0, frames, size), jnp.zeros((batch, 1, 1, *heads), jnp.float32)
    (total, high, low, most), _ = jax.lax.scan(
        measure, (zeros, zeros - jnp.inf, zeros + jnp.inf, zeros), begins
    )
    mean = total / (limits * patches)[:, None, None, None, None]
    key_scale = scale_for(jnp.maximum(high - mean, mean - low), dtype)
    value_scale = scale_for(most, dtype)

    def write(carry: tuple[Array, Array], begin: Array) -> tuple[tuple[Array, Array], None]:
        keys, values, real = chunk(begin)
        new = (
            quantise_at(key_scale, jnp.where(real, keys - mean, 0), dtype),
            quantise_at(value_scale, jnp.where(real, values, 0), dtype),
        )
        put = jax.lax.dynamic_update_slice_in_dim
        return tuple(put(x, y, begin, 1) for x, y in zip(carry, new, strict=True)), None  # type: ignore[return-value]

    none = jnp.zeros((batch, frames, patches, *heads), dtype)
    (keys, values), _ = jax.lax.scan(write, (none, none), begins)
    return KeysValues(keys, values, jnp.squeeze(key_scale, axes), jnp.squeeze(value_scale, axes))


def _scaled(x: Float[Array, "b t n h"], scale: Float[Array, "b k h"] | None) -> Float[Array, "b t n h"]:
    """Queries, or attention's output, times the scale of the keys or values that they read."""
    if scale is None:
        return x
    groups = x.reshape(*x.shape[:2], scale.shape[1], -1, x.shape[3])
    return (groups.astype(jnp.float32) * scale[:, None, :, None]).astype(x.dtype).reshape(x.shape)


def _visible_at(visible: VisibleFrames[Array], slots: Int[Array, "b n"]) -> VisibleFrames[Array]:
    """The visible frames of the tokens at `slots`; what is known of all holds for some."""
    return visible._replace(counts=jnp.take_along_axis(visible.counts, slots, axis=1))


def cross_attend(
    weights: dict[str, Array],
    x: Float[Array, "b u d"],
    source: KeysValues | Float[Array, "b f p d"],
    *,
    visible_frames: VisibleFrames[Array],
    times: Int[Array, "b t"],
    config: ModelConfig,
    scoped: bool = False,
    first: Array | int | None = None,
    rules: AxisRules | None = None,
) -> Float[Array, "b u d"]:
    """The gated update of the tokens `x` (without the residual), exactly 0 for a token that sees no frame.

    Args:
      weights: one layer's and direction's, in the compute dtype (norms and gate float32).
      x: T text tokens and padding, U >= T (`with_fewest_rows`); or the F*C compact tokens in frame order.
      source: keys and values of all F frames; or the original tokens, from which they are made on the way,
        for a long video not all at once (`attend_tokens`).
      visible_frames: of the T tokens; `SamePerRow` not with `scoped`. With keys and values of fewer rows
        than `x`, `SamePerRow`, and the same for all rows of a video.
      times: a token's place on the frame axis: its frame, or for text the number of frames before it. Only
        the rotary embedding over time uses it.
      config: the model configuration.
      scoped: narrow the frames that are read to `v2v_scope` (V2V only).
      first: of V2V, the frame of the first of `x` if they are not those of all frames; then `source` is
        tokens.
      rules: logical axis -> mesh axes; frames may be sharded.

    Returns:
      float[B, U, D], 0 for padding.
    """
    cross, counts = config.cross_attention, visible_frames.counts
    # Eq. 5 and 8: queries, none for padding.
    y = rms_norm(x, weights["query_norm"], config.decoder.rms_norm_eps)
    q = to_heads(y, weights["wq"], weights["bq"])[:, : counts.shape[1]]
    if cross.cross_attn_rope == "time":
        q = rotate(q, times, _rotary_of_time(config))
    # Eq. 6 and 9 where the source is tokens, else done before; then Attn of eq. 7 and 10.
    limits = counts
    if isinstance(visible_frames, AllOrNone):
        limits = None
    elif isinstance(visible_frames, SamePerRow):
        limits = counts[:, :1]
    elif isinstance(visible_frames, RowOrNone) and not (scoped and cross.v2v_scope != "video"):
        limits = jnp.max(counts, axis=1, keepdims=True)
    same = {"visible_frames": limits, "config": config, "scoped": scoped, "rules": rules}
    if isinstance(source, KeysValues):
        by_video = q.reshape(source.keys.shape[0], -1, *q.shape[2:])
        # Several questions about one video are one longer question to it.
        if limits is not None and len(by_video) < len(q):
            same["visible_frames"] = limits.reshape(len(by_video), -1)[:, :1]
        out = attend(_scaled(by_video, source.key_scale), source, **same)
        out = _scaled(out, source.value_scale).reshape(q.shape)
    else:
        make_kv = functools.partial(keys_values, config=config)
        out = attend_tokens(q, weights, source, make_kv=make_kv, first=first, **same)
    if isinstance(visible_frames, RowOrNone):
        out = jnp.where((counts > 0)[:, :, None, None], out, 0)
    # Eq. 7 and 10: the gate, and the output projection Wo.
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
    """float32 probabilities with which one text token per row reads each patch by T2V, mean over heads."""
    y = rms_norm(x, weights["query_norm"], config.decoder.rms_norm_eps)
    q = to_heads(y, weights["wq"], weights["bq"])[:, None]
    if config.cross_attention.cross_attn_rope == "time":
        q = rotate(q, visible_frames[:, None], _rotary_of_time(config))
    batch, frames, _, kv_heads, size = kv.keys.shape
    q = _scaled(q.astype(jnp.float32), kv.key_scale).reshape(batch, kv_heads, -1, size)
    scores = jnp.einsum("bkgh,bfpkh->bkgfp", q, kv.keys.astype(jnp.float32)) * size**-0.5
    seen = (jnp.arange(frames) < visible_frames[:, None])[:, None, None, :, None]
    scores = jnp.where(seen, scores, MASKED)
    probabilities = jnp.where(seen, jax.nn.softmax(scores, axis=(-2, -1)), 0.0)
    return jnp.mean(probabilities, axis=(1, 2))
