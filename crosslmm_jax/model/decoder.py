"""Qwen2's layers; every `cross_attn_every`-th has dual cross-attention between self-attention and MLP.

That is figure 2 of the paper.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.batch import Batch, RowOrNone, SamePerRow
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.dual_cross_attention import CrossWeights, DualCrossAttention, attention_map
from crosslmm_jax.model.encode_frames import Appended, Visual
from crosslmm_jax.model.kv_cache import KeysValues, KVCache, LayerCache
from crosslmm_jax.model.layer_loops import Placement, each_layer, scan_layers
from crosslmm_jax.model.loss import logits_of
from crosslmm_jax.model.ops import gather_tokens, rms_norm, with_fewest_rows
from crosslmm_jax.model.params.partitioning import AxisRules, constrain, constrain_output
from crosslmm_jax.model.params.tables import Params, cast, declare
from crosslmm_jax.model.qwen2 import decoder_weights, mlp, self_attention


class LayerOutput(NamedTuple):
    """What a layer computes beside the hidden states: its part of a KV cache."""

    keys: Float[Array, "b s k h"]  # self-attention's: S = T of a prompt, or the room of the cache
    values: Float[Array, "b s k h"]
    t2v: KeysValues | None = None  # of a prompt, in a layer with T2V


class Decoder(nn.Module):
    """Embedding, layers, final norm and head.

    Attributes:
      config: the model configuration.
      rules: logical axis -> mesh axes.
      stacked: layers in one array per parameter, or separate.
    """

    config: ModelConfig
    rules: AxisRules | None = None
    stacked: bool = True

    def setup(self) -> None:
        """Declares the parameters."""
        self.weights = declare(self, decoder_weights(self.config.decoder, stacked=self.stacked))

    def head(self) -> Float[Array, "d v"]:
        """The parameter from hidden states to logits, in the dtype that it has."""
        weights = self.weights
        return weights["embedding"].T if self.config.decoder.tie_embeddings else weights["lm_head"]

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """float32 logits of hidden states after the final norm."""
        logits = logits_of(hidden, self.head())
        return constrain_output(logits, self.rules, "act_batch", "act_len", "act_vocab")

    def hidden(self, batch: Batch[Array], visual: Visual, cross: DualCrossAttention) -> Float[Array, "b t d"]:
        """Hidden states of a prompt after the final norm.

        Stacked layers run in a scan: one program for all, recomputed in the backward pass.
        """
        if not self.stacked:
            return self.prefill(batch, visual, cross)[0]

        def layer(x: Array, weights: dict[str, Array], cross_weights: CrossWeights | None) -> Array:
            return self._prompt_layer(x, weights, cross_weights, batch, visual, cross)[0]

        x = scan_layers(
            layer, self._embed_prompt(batch, visual), self.weights["layers"], cross.weights(),
            placement=Placement.of(self.config), remat=self.config.decoder.remat,
        )  # fmt: skip
        return self._final_norm(x)

    def prefill(
        self, batch: Batch[Array], visual: Visual, cross: DualCrossAttention
    ) -> tuple[Float[Array, "b t d"], list[LayerOutput]]:
        """Hidden states of a prompt after the final norm, and what each layer adds to a KV cache."""

        def layer(
            x: Array, weights: dict[str, Array], cross_weights: CrossWeights | None, cache: None,
            prompt: tuple[Batch[Array], Visual],
        ) -> tuple[Array, LayerOutput]:  # fmt: skip
            return self._prompt_layer(x, weights, cross_weights, *prompt, cross)

        placement = Placement.of(self.config)
        x, outputs = each_layer(
            layer, self._embed_prompt(batch, visual), self.weights["layers"], cross.weights(),
            [None] * placement.num_layers, (batch, visual), placement=placement,
        )  # fmt: skip
        return self._final_norm(x), outputs

    def extend(
        self, tokens: Int[Array, "b t"], cache: KVCache, cross: DualCrossAttention
    ) -> tuple[Float[Array, "b u d"], list[LayerOutput]]:
        """Hidden states of text after a KV cache, and the extended cache of each layer.

        T text tokens and padding, U >= T: padding makes matrix products faster (`with_fewest_rows`).
        """

        def layer(
            x: Array, weights: dict[str, Array], cross_weights: CrossWeights | None, cache: LayerCache,
            text: _TextPositions,
        ) -> tuple[Array, LayerOutput]:  # fmt: skip
            return self._text_layer(x, weights, cross_weights, cache, text, cross)

        placement = Placement.of(self.config)
        x, outputs = each_layer(
            layer, with_fewest_rows(self._embed(tokens)), self.weights["layers"], cross.weights(),
            _layer_caches(cache, placement), _text_positions(tokens, cache), placement=placement,
        )  # fmt: skip
        return self._final_norm(x), outputs

    def append(
        self, visual: Visual, count: Int[Array, ""], cache: KVCache, cross: DualCrossAttention
    ) -> list[LayerOutput]:
        """What each layer's cache is after further frames; arguments as of `CrossLMM.append`."""
        tokens, first = self.config.merge.tokens_per_frame, cache.visible_frames[0]
        places = jnp.arange(visual.compact.shape[1])
        visible = jnp.where(places < count * tokens, first + count, 0)
        shape = visual.compact.shape[:2]
        appended = Appended(visual.originals, RowOrNone(jnp.broadcast_to(visible, shape)), first)
        positions = cache.num_tokens[:, None] + places

        def layer(
            x: Array, weights: dict[str, Array], cross_weights: CrossWeights | None, cache: LayerCache,
            shared: tuple[Array, Appended],
        ) -> tuple[Array, LayerOutput]:  # fmt: skip
            positions, appended = shared
            weights, t2v = self._cast(weights), cache.t2v
            x, keys, values = self._self_attention(weights, x, positions, cache)
            if cross_weights is not None:
                x, t2v = cross.over_frames(self._cast(cross_weights), x, t2v, appended)
            return self._mlp(weights, x), LayerOutput(keys, values, t2v)

        placement, x = Placement.of(self.config), visual.compact.astype(self.config.compute_dtype)
        _, outputs = each_layer(
            layer, with_fewest_rows(x), self.weights["layers"], cross.weights(),
            _layer_caches(cache, placement), (positions, appended), placement=placement,
        )  # fmt: skip
        return outputs

    def attention_maps(
        self, tokens: Int[Array, "b t"], last: Int[Array, " b"], cache: KVCache, cross: DualCrossAttention
    ) -> Float[Array, "x b f p"]:
        """What the token at `last` of each row reads by T2V, in each of the X layers with cross-attention."""

        def layer(
            x: Array, weights: dict[str, Array], cross_weights: CrossWeights | None, cache: LayerCache,
            observed: tuple[_TextPositions, Array],
        ) -> tuple[Array, Array | None]:  # fmt: skip
            return self._observed_layer(x, weights, cross_weights, cache, *observed, cross)

        placement = Placement.of(self.config)
        _, maps = each_layer(
            layer, self._embed(tokens), self.weights["layers"], cross.weights(),
            _layer_caches(cache, placement), (_text_positions(tokens, cache), last), placement=placement,
        )  # fmt: skip
        return jnp.stack([of_layer for of_layer in maps if of_layer is not None])

    def _embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return jnp.take(self.weights["embedding"], tokens, axis=0).astype(self.config.compute_dtype)

    def _embed_prompt(self, batch: Batch[Array], visual: Visual) -> Float[Array, "b t d"]:
        """Embeddings of all tokens, the compact tokens at their slots."""
        x = self._embed(batch.tokens)
        if batch.visual_slots.shape[1]:
            x = jax.vmap(lambda row, at, new: row.at[at].set(new))(x, batch.visual_slots, visual.compact)
        return constrain(x, self.rules, "act_batch", "act_len", "act_embed")

    def _prompt_layer(
        self,
        x: Float[Array, "b t d"],
        weights: dict[str, Array],
        cross_weights: CrossWeights | None,
        batch: Batch[Array],
        visual: Visual,
        cross: DualCrossAttention,
    ) -> tuple[Float[Array, "b t d"], LayerOutput]:
        """A layer over a prompt with its visual tokens."""
        weights, t2v = self._cast(weights), None
        x, keys, values = self._self_attention(weights, x, batch.positions)
        if cross_weights is not None:
            x, t2v = cross.over_prompt(self._cast(cross_weights), x, batch, visual)
        return self._mlp(weights, x), LayerOutput(keys, values, t2v)

    def _text_layer(
        self,
        x: Float[Array, "b u d"],
        weights: dict[str, Array],
        cross_weights: CrossWeights | None,
        cache: LayerCache,
        text: "_TextPositions",
        cross: DualCrossAttention,
    ) -> tuple[Float[Array, "b u d"], LayerOutput]:
        """A layer over text after a KV cache."""
        weights = self._cast(weights)
        x, keys, values = self._self_attention(weights, x, text.positions, cache)
        if cross_weights is not None and "t2v" in cross_weights and cache.t2v is not None:
            x = cross.over_text(self._cast(cross_weights), x, cache.t2v, text.visible_frames)
        return self._mlp(weights, x), LayerOutput(keys, values)

    def _observed_layer(
        self,
        x: Float[Array, "b t d"],
        weights: dict[str, Array],
        cross_weights: CrossWeights | None,
        cache: LayerCache,
        text: "_TextPositions",
        token: Int[Array, " b"],
        cross: DualCrossAttention,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b f p"] | None]:
        """A layer over text after a KV cache, with the T2V attention map of one token per row."""
        weights, attended = self._cast(weights), None
        x, _, _ = self._self_attention(weights, x, text.positions, cache)
        if cross_weights is not None and "t2v" in cross_weights and cache.t2v is not None:
            cross_weights, visible = self._cast(cross_weights), text.visible_frames
            attended = attention_map(
                cross_weights["t2v"], gather_tokens(x, token[:, None])[:, 0], cache.t2v,
                visible_frames=visible.counts[:, 0], config=self.config,
            )  # fmt: skip
            x = cross.over_text(cross_weights, x, cache.t2v, visible)
        return self._mlp(weights, x), attended

    def _cast(self, weights: Params) -> Params:
        return cast(weights, jnp.dtype(self.config.compute_dtype))

    def _self_attention(
        self, weights: dict[str, Array], x: Array, positions: Array, cache: LayerCache | None = None
    ) -> tuple[Array, Array, Array]:
        c = self.config
        return self_attention(
            weights, x, positions, config=c.decoder, backend=c.attention, cache=cache, rules=self.rules
        )

    def _mlp(self, weights: dict[str, Array], x: Array) -> Array:
        x = mlp(weights, x, config=self.config.decoder)
        return constrain(x, self.rules, "act_batch", "act_len", "act_embed")

    def _final_norm(self, x: Array) -> Array:
        return rms_norm(x, self.weights["final_norm"], self.config.decoder.rms_norm_eps)


class _TextPositions(NamedTuple):
    """Positions and visible frames of text after a KV cache; the same in every layer."""

    positions: Int[Array, "b t"]
    visible_frames: SamePerRow[Array]


def _layer_caches(cache: KVCache, placement: Placement) -> list[LayerCache]:
    return [cache.layer(index, placement.cross_index(index)) for index in range(placement.num_layers)]


def _text_positions(tokens: Int[Array, "b t"], cache: KVCache) -> _TextPositions:
    """Text comes after all tokens of the cache and sees all frames that the cache holds."""
    positions = cache.num_tokens[:, None] + jnp.arange(tokens.shape[1])
    visible = jnp.broadcast_to(cache.visible_frames[:, None], tokens.shape)
    return _TextPositions(positions, SamePerRow(visible))
