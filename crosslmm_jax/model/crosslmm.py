"""CrossLMM: frames and tokens in, logits out (paper fig. 2).

`CrossLMM` holds the parts and passes arrays between them; every method is pure and is called with
`model.apply({"params": params}, ..., method="name")`. A batch is a mapping of arrays, as `data` makes it:

    frames          uint8[B, F, R, R, 3]
    tokens          int32[B, T]            a placeholder sits at every visual slot
    positions       int32[B, T]
    visual_slots    int32[B, F*C]          where the compact tokens sit in the sequence, in frame order
    text_slots      int32[B, T - F*C]      all other places
    visible_frames  int32[B, T]            how many frames a token may read
    loss_mask       float32[B, T]          1 where the token is to be predicted
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.cache import Cache, empty_cache
from crosslmm_jax.model.cross_attention import (
    KeysValues,
    attention_map,
    cross_attend,
    cross_attention_weights,
    keys_values,
    kv_width,
)
from crosslmm_jax.model.loss import logits_of, next_token_loss
from crosslmm_jax.model.merge import Projector
from crosslmm_jax.model.ops import add_at, gather_tokens, rms_norm
from crosslmm_jax.model.partitioning import AxisRules, constrain
from crosslmm_jax.model.qwen2 import LayerCache, decoder_weights, mlp, self_attention
from crosslmm_jax.model.siglip import SiglipEncoder
from crosslmm_jax.model.stack import Placement, scan_layers
from crosslmm_jax.model.vision import Visual, encode_in_chunks
from crosslmm_jax.model.weights import WeightTable, cast, declare

Batch = Mapping[str, Array]


class Weights(nn.Module):
    """A part that is nothing but its parameters."""

    table: WeightTable

    def setup(self) -> None:
        """Declares the parameters."""
        self.values = declare(self, self.table)

    def __call__(self) -> dict[str, Any]:
        """The parameters under their names."""
        return dict(self.values)


class CrossLMM(nn.Module):
    """Encoder, token merge and projector, decoder, and the two directions of cross-attention.

    Attributes:
      config: sizes and choices; `config.cross_attention.directions` says what is in the graph.
      rules: logical axis of an activation -> mesh axes, or None to leave all layout to the compiler.
    """

    config: ModelConfig
    rules: AxisRules | None = None

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        self.encoder = SiglipEncoder(c.vision, c.compute_dtype, c.attention)
        self.projector = Projector(c.merge, c.vision.width, c.decoder.width, c.compute_dtype)
        self.decoder = Weights(decoder_weights(c.decoder))
        self.v2v = Weights(cross_attention_weights(c))
        self.t2v = Weights(cross_attention_weights(c))

    def declare(self) -> None:
        """Touches every parameter, so that `init` needs no batch and computes nothing."""
        for part in (self.encoder, self.projector):
            _ = part.weights
        for part in (self.decoder, self.v2v, self.t2v):
            part()

    def __call__(self, batch: Batch) -> Float[Array, "b t v"]:
        """float32[B, T, V] logits of every position. For short sequences: see `loss` and `prefill`."""
        return self._logits(self.hidden(self.encode(batch["frames"]), batch))

    def loss(self, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Sum of the cross-entropies of the targets in nats, and how many targets there are."""
        hidden = self.hidden(self.encode(batch["frames"]), batch)
        return next_token_loss(hidden, self._head(), batch["tokens"], batch["loss_mask"])

    def encode(self, frames: Array) -> Visual:
        """uint8[B, F, R, R, 3] to the tokens that the decoder and cross-attention read."""
        c = self.config
        if frames.shape[1] == 0:
            dtype = jnp.dtype(c.compute_dtype)
            originals = (frames.shape[0], 0, c.vision.num_patches, kv_width(c))
            return Visual(
                jnp.zeros((frames.shape[0], 0, c.decoder.width), dtype), jnp.zeros(originals, dtype)
            )
        # Linen binds modules, not functions: inside a scan the bound parts are closed over as values.
        return encode_in_chunks(
            frames, encode=self.encoder, project=self.projector, config=c, rules=self.rules
        )

    def hidden(self, visual: Visual, batch: Batch) -> Float[Array, "b t d"]:
        """float[B, T, D] last hidden states, behind the final norm."""
        return self._run(visual, batch, None)[0]

    def prefill(
        self, visual: Visual, batch: Batch, counts: Int[Array, " b"], *, cache_size: int
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Reads a prompt and returns the logits behind it, with the cache that `extend` goes on from.

        Args:
          visual: of `encode`.
          batch: a batch without frames and loss mask.
          counts: int32[B], tokens of each row that are not padding (padding is at the end).
          cache_size: room for tokens a row.
        """
        cache = empty_cache(self.config, counts.shape[0], cache_size)
        hidden, filled = self._run(visual, batch, cache)
        last = (counts - 1)[:, None]
        visible = jnp.take_along_axis(batch["visible_frames"], last, axis=1)[:, 0]
        cache = filled._replace(lengths=counts, visible_frames=visible)
        return self._logits(gather_tokens(hidden, last))[:, 0], cache

    def extend(
        self, cache: Cache, tokens: Int[Array, "b t"], counts: Int[Array, " b"]
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Adds text behind what the cache holds: a question of many tokens, or one generated token.

        Args:
          cache: of `prefill` or `extend`; all frames it holds may be read.
          tokens: int32[B, T], padded at the end.
          counts: int32[B], tokens of each row that are not padding, at least 1.

        Returns:
          float32[B, V] logits behind each row's last token, and the cache.
        """
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        visible = jnp.broadcast_to(cache.visible_frames[:, None], tokens.shape)
        x = self._embed(tokens)
        x, extended, _ = self._layers(x, positions, visible, cache=cache)
        cache = cache._replace(keys=extended.keys, values=extended.values, lengths=cache.lengths + counts)
        x = rms_norm(x, self.decoder()["final_norm"], self.config.decoder.rms_norm_eps)
        return self._logits(gather_tokens(x, (counts - 1)[:, None]))[:, 0], cache

    def observe(
        self, cache: Cache, tokens: Int[Array, "b t"], counts: Int[Array, " b"]
    ) -> Float[Array, "x b f p"]:
        """What each row's last token reads by T2V; arguments as of `extend`.

        Returns:
          float32[X, B, F, P] probabilities, mean over heads, for the X layers with cross-attention.
        """
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        visible = jnp.broadcast_to(cache.visible_frames[:, None], tokens.shape)
        return self._layers(self._embed(tokens), positions, visible, cache=cache, observed=counts - 1)[2]

    def _embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        embedding = self.decoder()["embedding"]
        return jnp.take(embedding, tokens, axis=0).astype(self.config.compute_dtype)

    def _head(self) -> Float[Array, "d v"]:
        weights = self.decoder()
        head = weights["embedding"].T if self.config.decoder.tie_embeddings else weights["lm_head"]
        return head.astype(self.config.compute_dtype)

    def _logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        return constrain(logits_of(hidden, self._head()), self.rules, "act_batch", "act_len", "act_vocab")

    def _run(self, visual: Visual, batch: Batch, cache: Cache | None) -> tuple[Array, Any]:
        """A whole sequence through embedding, layers and final norm."""
        x = self._embed(batch["tokens"])
        slots = batch["visual_slots"]
        if slots.shape[1]:
            x = jax.vmap(lambda row, at, new: row.at[at].set(new))(x, slots, visual.compact)
        x = constrain(x, self.rules, "act_batch", "act_len", "act_embed")
        x, cache, t2v = self._layers(
            x, batch["positions"], batch["visible_frames"], cache=cache, visual=visual, batch=batch
        )
        if cache is not None:
            cache = cache._replace(t2v=t2v)
        return rms_norm(x, self.decoder()["final_norm"], self.config.decoder.rms_norm_eps), cache

    def _layers(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        visible_frames: Int[Array, "b t"],
        *,
        cache: Cache | None = None,
        visual: Visual | None = None,
        batch: Batch | None = None,
        observed: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any, Any]:
        """All decoder layers: over a whole sequence (`visual` and `batch`), or over text behind `cache`.

        Returns:
          The hidden states, the extended cache, and what each layer with cross-attention leaves: T2V keys
          and values when a prompt fills a cache, attention maps of the tokens at `observed`, or nothing.
        """
        c, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        directions = c.cross_attention.directions
        own = None if cache is None else LayerCache(cache.keys, cache.values, jnp.int32(0), cache.lengths)

        def attend(carry: Any, layer: Any) -> Any:
            x, own = carry
            return self_attention(
                layer,
                x,
                positions,
                config=c.decoder,
                backend=c.attention,
                cache=own,
                from_empty=visual is not None,
            )

        def finish(x: Array, layer: Any, own: LayerCache | None) -> Any:
            x = constrain(mlp(layer, x, config=c.decoder), self.rules, "act_batch", "act_len", "act_embed")
            return x, None if own is None else own._replace(layer=own.layer + 1)

        def plain(carry: Any, layer: Any) -> Any:
            layer = cast(layer, dtype)
            x, own = attend(carry, layer)
            return finish(x, layer, own)

        def crossed(carry: Any, layer: Any, cross: Any) -> tuple[Any, Any]:
            layer, cross = cast(layer, dtype), cross | {d: cast(cross[d], dtype) for d in directions}
            x, own = attend(carry, layer)
            if visual is not None and batch is not None:
                x, left = self._dual_cross_attention(x, cross, visual, batch)
            else:
                x, left = self._text_to_visual(x, cross, visible_frames, observed)
            return finish(x, layer, own), left if cache is not None else None

        cross = {d: getattr(self, d)() for d in directions}
        if visual is None and cache is not None and cache.t2v is not None:
            cross["kv"] = cache.t2v
        placement = Placement(
            c.decoder.num_layers, c.cross_attention.cross_attn_every, c.cross_attention.cross_attn_offset
        )
        (x, own), left = scan_layers(
            plain, crossed, (x, own), self.decoder()["layers"], cross,
            placement=placement, remat=c.decoder.remat and cache is None,
        )  # fmt: skip
        if cache is not None and own is not None:
            cache = cache._replace(keys=own.keys, values=own.values)
        return x, cache, left

    def _dual_cross_attention(
        self, x: Array, cross: dict[str, Any], visual: Visual, batch: Batch
    ) -> tuple[Array, KeysValues | None]:
        """Both directions in parallel: each reads the hidden states that self-attention left."""
        c, frames = self.config, visual.originals.shape[1]
        if frames == 0:
            return x, None
        visible, out, t2v = batch["visible_frames"], x, None
        if "v2v" in cross:
            with jax.named_scope("v2v"):
                slots = batch["visual_slots"]
                frame = jnp.repeat(jnp.arange(frames), c.merge.tokens_per_frame)
                v2v = keys_values(cross["v2v"], visual.originals, config=c)
                update = cross_attend(
                    cross["v2v"], gather_tokens(x, slots), v2v,
                    visible_frames=jnp.take_along_axis(visible, slots, axis=1),
                    times=jnp.broadcast_to(frame, slots.shape), config=c, scoped=True, rules=self.rules,
                )  # fmt: skip
                out = add_at(out, slots, update)
        if "t2v" in cross:
            with jax.named_scope("t2v"):
                slots = batch["text_slots"]
                t2v = keys_values(cross["t2v"], visual.originals, config=c)
                seen = jnp.take_along_axis(visible, slots, axis=1)
                update = cross_attend(
                    cross["t2v"], gather_tokens(x, slots), t2v,
                    visible_frames=seen, times=seen, config=c, rules=self.rules,
                )  # fmt: skip
                out = add_at(out, slots, update)
        return out, t2v

    def _text_to_visual(
        self, x: Array, cross: dict[str, Any], visible_frames: Array, observed: Array | None
    ) -> tuple[Array, Array | None]:
        """T2V from cached keys and values, and the attention maps of the tokens at `observed`."""
        if "t2v" not in cross or "kv" not in cross:
            return x, None
        maps = None
        if observed is not None:
            token = gather_tokens(x, observed[:, None])[:, 0]
            seen = visible_frames[:, 0]
            maps = attention_map(cross["t2v"], token, cross["kv"], visible_frames=seen, config=self.config)
        with jax.named_scope("t2v"):
            update = cross_attend(
                cross["t2v"], x, cross["kv"], visible_frames=visible_frames, times=visible_frames,
                config=self.config, rules=self.rules,
            )  # fmt: skip
        return x + update, maps
