"""CrossLMM: frames and tokens in, logits out (paper fig. 2).

`CrossLMM` holds the parts and passes arrays between them; every method is pure and is called with
`model.apply({"params": params}, ..., method="name")`.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.batch import Batch, SamePerRow, VisibleFrames, needed
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.cross_attention import cross_attention_weights, kv_width
from crosslmm_jax.model.decoder_layer import decoder_layer
from crosslmm_jax.model.encode_frames import Visual, encode_in_chunks
from crosslmm_jax.model.encoder import SiglipEncoder
from crosslmm_jax.model.kv_cache import Cache
from crosslmm_jax.model.layer_scan import Placement, scan_layers
from crosslmm_jax.model.loss import logits_of, next_token_loss
from crosslmm_jax.model.ops import gather_tokens, rms_norm, with_fewest_rows
from crosslmm_jax.model.params.partitioning import AxisRules, constrain, constrain_output
from crosslmm_jax.model.params.tables import WeightTable, declare, layer_of
from crosslmm_jax.model.pooler import Pooler
from crosslmm_jax.model.qwen2 import decoder_weights


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
      rules: logical axis of an activation -> mesh axes, or None to leave all layout to the compiler, and with
        it, on several devices, the attention kernels that it cannot divide.
      stacked: parameters are as `init_params` makes them, the layers of a stack in one array; False: as
        `separate_layers` makes them, which is what inference on accelerators should read.
    """

    config: ModelConfig
    rules: AxisRules | None = None
    stacked: bool = True

    def setup(self) -> None:
        """Declares the parameters."""
        c = self.config
        self.encoder = SiglipEncoder(
            c.vision, c.compute_dtype, c.attention, self.rules, c.visual_matmul, self.stacked
        )
        self.pooler = Pooler(c, name="projector")  # by its parameters
        self.decoder = Weights(decoder_weights(c.decoder, stacked=self.stacked))
        self.v2v = Weights(cross_attention_weights(c, stacked=self.stacked))
        self.t2v = Weights(cross_attention_weights(c, stacked=self.stacked))

    def declare(self) -> None:
        """Touches every parameter, so that `init` needs no batch and computes nothing."""
        for part in (self.encoder, self.pooler):
            _ = part.weights
        for part in (self.decoder, self.v2v, self.t2v):
            part()

    def __call__(self, batch: Batch) -> Float[Array, "b t v"]:
        """float32[B, T, V] logits of every position. For short sequences: see `loss` and `prefill`."""
        return self._logits(self.hidden(self.encode(needed(batch.frames, "frames")), batch))

    def loss(self, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Sum of the cross-entropies of the targets in nats, and how many targets there are."""
        hidden = self.hidden(self.encode(needed(batch.frames, "frames")), batch)
        return next_token_loss(hidden, self._head(), batch.tokens, needed(batch.loss_mask, "loss_mask"))

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
        return encode_in_chunks(frames, encode=self.encoder, pool=self.pooler, config=c, rules=self.rules)

    def hidden(self, visual: Visual, batch: Batch) -> Float[Array, "b t d"]:
        """float[B, T, D] last hidden states, behind the final norm."""
        return self._run(visual, batch)[0]

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
        hidden, left = self._run(visual, batch, keep=True)
        last = (counts - 1)[:, None]
        visible = jnp.take_along_axis(batch.visible_frames.counts, last, axis=1)[:, 0]
        t2v = tuple(x for x in left.crossed if x is not None) or None
        cache = Cache(left.keys, left.values, counts, visible, t2v).resized(cache_size)
        return self._logits(gather_tokens(hidden, last))[:, 0], cache

    def extend(
        self, cache: Cache, tokens: Int[Array, "b t"], counts: Int[Array, " b"]
    ) -> tuple[Float[Array, "b v"], Cache]:
        """Adds text behind what the cache holds: a question of many tokens, or one generated token.

        Args:
          cache: of `prefill` or `extend`; all frames it holds may be read. It must have room for T more
            tokens a row, padding too, which is written until what comes next overwrites it.
          tokens: int32[B, T], padded at the end.
          counts: int32[B], tokens of each row that are not padding, at least 1.

        Returns:
          float32[B, V] logits behind each row's last token, and the cache.
        """
        positions = cache.lengths[:, None] + jnp.arange(tokens.shape[1])
        visible = SamePerRow(jnp.broadcast_to(cache.visible_frames[:, None], tokens.shape))
        x = with_fewest_rows(self._embed(tokens))
        x, left = self._each_layer(x, positions, visible, cache=cache)
        cache = cache._replace(keys=left.keys, values=left.values, lengths=cache.lengths + counts)
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
        visible = SamePerRow(jnp.broadcast_to(cache.visible_frames[:, None], tokens.shape))
        _, left = self._each_layer(self._embed(tokens), positions, visible, cache=cache, observed=counts - 1)
        return jnp.stack([maps for maps in left.crossed if maps is not None])

    def _embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        embedding = self.decoder()["embedding"]
        return jnp.take(embedding, tokens, axis=0).astype(self.config.compute_dtype)

    def _head(self) -> Float[Array, "d v"]:
        weights = self.decoder()
        head = weights["embedding"].T if self.config.decoder.tie_embeddings else weights["lm_head"]
        return head.astype(self.config.compute_dtype)

    def _logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        logits = logits_of(hidden, self._head())
        return constrain_output(logits, self.rules, "act_batch", "act_len", "act_vocab")

    def _run(self, visual: Visual, batch: Batch, *, keep: bool = False) -> "tuple[Array, _Left]":
        """A whole sequence through embedding, layers and final norm, and what its layers left."""
        x = self._embed(batch.tokens)
        slots = batch.visual_slots
        if slots.shape[1]:
            x = jax.vmap(lambda row, at, new: row.at[at].set(new))(x, slots, visual.compact)
        x = constrain(x, self.rules, "act_batch", "act_len", "act_embed")
        arguments = batch.positions, batch.visible_frames
        left = _Left((), (), ())
        if keep or not self.stacked:
            x, left = self._each_layer(x, *arguments, visual=visual, batch=batch, keep=keep)
        else:
            x = self._scanned_layers(x, *arguments, visual=visual, batch=batch)
        return rms_norm(x, self.decoder()["final_norm"], self.config.decoder.rms_norm_eps), left

    def _scanned_layers(
        self, x: Array, positions: Array, visible_frames: VisibleFrames, *, visual: Visual, batch: Batch
    ) -> Float[Array, "b t d"]:
        """All decoder layers over a whole sequence: one program for all, recomputed in the backward pass."""
        c = self.config
        one = functools.partial(
            decoder_layer, positions=positions, visible_frames=visible_frames, config=c, rules=self.rules,
        )  # fmt: skip

        def plain(x: Array, layer: Any) -> Array:
            return one(x, layer, None)[0]

        def crossed(x: Array, layer: Any, cross: Any) -> Array:
            return one(x, layer, cross, visual=visual, batch=batch)[0]

        cross = {direction: getattr(self, direction)() for direction in c.cross_attention.directions}
        placement = Placement(
            c.decoder.num_layers, c.cross_attention.cross_attn_every, c.cross_attention.cross_attn_offset
        )
        return scan_layers(
            plain, crossed, x, self.decoder()["layers"], cross, placement=placement, remat=c.decoder.remat
        )

    def _each_layer(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        visible_frames: VisibleFrames,
        *,
        cache: Cache | None = None,
        visual: Visual | None = None,
        batch: Batch | None = None,
        observed: Int[Array, " b"] | None = None,
        keep: bool = True,
    ) -> "tuple[Float[Array, 'b t d'], _Left]":
        """All decoder layers one by one, over a whole sequence (`visual`, `batch`) or text behind `cache`.

        Returns:
          The hidden states, and what the layers left, empty unless it is to be kept.
        """
        c, left = self.config, []
        layers, at = self.decoder()["layers"], c.cross_attention_layers
        directions = {direction: getattr(self, direction)() for direction in c.cross_attention.directions}
        for index in range(c.decoder.num_layers):
            cross = None
            if index in at:
                number = at.index(index)
                cross = {name: layer_of(weights, number) for name, weights in directions.items()}
            x, keys, values, crossed = decoder_layer(
                x, layer_of(layers, index), cross, positions=positions, visible_frames=visible_frames,
                own=None if cache is None else cache.layer(index), visual=visual, batch=batch,
                t2v=None if cache is None or cache.t2v is None or cross is None else cache.t2v[number],
                observed=observed, config=c, rules=self.rules,
            )  # fmt: skip
            if keep:
                left.append((keys, values, crossed))
        return x, _Left(*zip(*left, strict=True)) if left else _Left((), (), ())


class _Left(NamedTuple):
    """What the layers leave behind, an entry a layer."""

    keys: tuple[Float[Array, "b s k h"], ...]
    values: tuple[Float[Array, "b s k h"], ...]
    crossed: tuple[Any, ...]  # see `decoder_layer`
