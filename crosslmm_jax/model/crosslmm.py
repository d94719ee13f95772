"""CrossLMM: frames and tokens in, logits out (paper fig. 2).

Every method of `CrossLMM` is pure. `apply(model, params, CrossLMM.loss, batch)` calls one with parameters.
"""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, UInt8

from crosslmm_jax.batch import Batch, needed
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.decoder import Decoder
from crosslmm_jax.model.dual_cross_attention import DualCrossAttention, kv_width
from crosslmm_jax.model.encode_frames import Visual, encode_in_chunks
from crosslmm_jax.model.encoder import SiglipEncoder
from crosslmm_jax.model.kv_cache import KVCache
from crosslmm_jax.model.loss import Scores, next_token_loss, next_token_scores
from crosslmm_jax.model.ops import gather_tokens
from crosslmm_jax.model.params.partitioning import AxisRules
from crosslmm_jax.model.pooler import Pooler

P = ParamSpec("P")
R = TypeVar("R")


class CrossLMM(nn.Module):
    """Encoder, pooler (token merge and projector), decoder, and dual cross-attention.

    Attributes:
      config: sizes and choices; `config.cross_attention.directions` says what is in the graph.
      rules: logical axis of an activation -> mesh axes. None leaves all layout to the compiler; on several
        devices that also rules out the attention kernels, which it cannot divide.
      stacked: the layers of a stack in one array per parameter, as `init_params` makes them. False: separate
        arrays per layer, as `separate_layers` makes them, which inference on accelerators should use.
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
        self.decoder = Decoder(c, self.rules, self.stacked)
        self.dual_cross_attention = DualCrossAttention(c, self.rules, self.stacked)
        # Parameters are `v2v` and `t2v` at the top of the tree, not under the module's name.
        nn.share_scope(self, self.dual_cross_attention)

    def declare(self) -> None:
        """Touches every parameter, so that `init` needs no batch and computes nothing."""
        for part in (self.encoder, self.pooler, self.decoder):
            _ = part.weights
        self.dual_cross_attention.declare()

    def __call__(self, batch: Batch[Array]) -> Float[Array, "b t v"]:
        """float32 logits of every position. For short sequences: see `loss` and `prefill`."""
        return self.decoder.logits(self.hidden(self.encode(needed(batch.frames, "frames")), batch))

    def loss(self, batch: Batch[Array]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Sum of the cross-entropies of the targets in nats, and the number of targets."""
        hidden = self.hidden(self.encode(needed(batch.frames, "frames")), batch)
        mask = needed(batch.loss_mask, "loss_mask")
        return next_token_loss(hidden, self.decoder.head(), batch.tokens, mask, self.rules)

    def scores(self, batch: Batch[Array]) -> Scores:
        """`loss`, and how many targets are the most probable token (teacher forcing)."""
        hidden = self.hidden(self.encode(needed(batch.frames, "frames")), batch)
        mask = needed(batch.loss_mask, "loss_mask")
        return next_token_scores(hidden, self.decoder.head(), batch.tokens, mask, self.rules)

    def encode(self, frames: UInt8[Array, "b f r r 3"]) -> Visual:
        """The compact tokens that the decoder reads and the original tokens that cross-attention reads."""
        c = self.config
        if frames.shape[1] == 0:
            dtype = jnp.dtype(c.compute_dtype)
            originals = (frames.shape[0], 0, c.vision.num_patches, kv_width(c))
            return Visual(
                jnp.zeros((frames.shape[0], 0, c.decoder.width), dtype), jnp.zeros(originals, dtype)
            )
        return encode_in_chunks(frames, encode=self.encoder, pool=self.pooler, config=c, rules=self.rules)

    def hidden(self, visual: Visual, batch: Batch[Array]) -> Float[Array, "b t d"]:
        """Hidden states after the final norm."""
        return self.decoder.hidden(batch, visual, self.dual_cross_attention)

    def prefill(
        self, visual: Visual, batch: Batch[Array], counts: Int[Array, " b"], *, cache_size: int,
        cache_frames: int | None = None,
    ) -> tuple[Float[Array, "b v"], KVCache]:  # fmt: skip
        """Runs a prompt and returns float32 logits after its last token, and the cache for `extend`.

        Args:
          visual: the prompt's video, from `encode`.
          batch: the prompt; pixels and loss mask are not needed.
          counts: tokens per row that are not padding (padding is at the end).
          cache_size: room for tokens per row.
          cache_frames: room for frames in T2V's part; None: as many as `visual` has.
        """
        hidden, outputs = self.decoder.prefill(batch, visual, self.dual_cross_attention)
        last = (counts - 1)[:, None]
        visible = jnp.take_along_axis(batch.visible_frames.counts, last, axis=1)[:, 0]
        keys, values, t2v = zip(*outputs, strict=True)
        room = visual.originals.shape[1] if cache_frames is None else cache_frames
        of_video = tuple(kv.resized(room) for kv in t2v if kv is not None) or None
        cache = KVCache(keys, values, counts, visible, of_video).resized(cache_size)
        return self.decoder.logits(gather_tokens(hidden, last))[:, 0], cache

    def append(self, cache: KVCache, visual: Visual, count: Int[Array, ""]) -> KVCache:
        """Adds frames after what the cache holds: a video that goes on.

        The new frames see each other and all frames before them (as `v2v_scope` narrows); those before do not
        see the new ones. So the result equals a prefill whose visual tokens have these `visible_frames`.

        Args:
          cache: of rows that hold equally many frames; it must have room for n frames more and their tokens,
            and is not in 8 bits. Padding is written too, and overwritten by what comes next.
          visual: the n*C compact tokens of the new frames; the original tokens of all frames, those of the
            cache first, then the new ones, then padding up to any F.
          count: new frames that are not padding, from the first on.
        """
        outputs = self.decoder.append(visual, count, cache, self.dual_cross_attention)
        keys, values, t2v = zip(*outputs, strict=True)
        of_video = tuple(kv for kv in t2v if kv is not None) or None
        more = count * self.config.merge.tokens_per_frame
        return KVCache(keys, values, cache.num_tokens + more, cache.visible_frames + count, of_video)

    def extend(
        self, cache: KVCache, tokens: Int[Array, "b t"], counts: Int[Array, " b"]
    ) -> tuple[Float[Array, "b v"], KVCache]:
        """Adds text after what the cache holds: a question of many tokens, or one generated token.

        Args:
          cache: from `prefill` or `extend`; the text sees all its frames. It must have room for T more tokens
            per row: padding is written too, and overwritten by what comes next.
          tokens: int32, padded at the end.
          counts: tokens per row that are not padding.

        Returns:
          float32 logits after each row's last token, without meaning where `counts` is 0, and the cache.
        """
        hidden, outputs = self.decoder.extend(tokens, cache, self.dual_cross_attention)
        keys, values, _ = zip(*outputs, strict=True)
        cache = cache._replace(keys=keys, values=values, num_tokens=cache.num_tokens + counts)
        return self.decoder.logits(gather_tokens(hidden, (counts - 1)[:, None]))[:, 0], cache

    def score(
        self, cache: KVCache, tokens: Int[Array, "b t"], targets: Int[Array, "b t"], *, vocab_size: int
    ) -> Float[Array, "b t"]:
        """float32 log-probability of each of `targets` after the cache and `tokens` up to the same place.

        Args:
          cache: as of `extend`; it needs room for T more tokens per row.
          tokens: int32, padded at the end.
          targets: int32; what is returned for a target after padding has no meaning.
          vocab_size: tokens among which probabilities are shared out; logits beyond them are left out.
        """
        hidden, _ = self.decoder.extend(tokens, cache, self.dual_cross_attention)
        logits = self.decoder.logits(hidden[:, : tokens.shape[1]])[..., :vocab_size]
        of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return of_target - jax.nn.logsumexp(logits, axis=-1)

    def observe(
        self, cache: KVCache, tokens: Int[Array, "b t"], counts: Int[Array, " b"]
    ) -> Float[Array, "x b f p"]:
        """What each row's last token reads by T2V; arguments as of `extend`.

        Returns:
          float32 probabilities, mean over heads, for the X layers with cross-attention.
        """
        return self.decoder.attention_maps(tokens, counts - 1, cache, self.dual_cross_attention)


def apply(
    model: CrossLMM,
    params: PyTree[Array],
    method: Callable[Concatenate[CrossLMM, P], R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Calls a method of the model with parameters: `model.apply`, with the types of the method."""
    result: R = model.apply({"params": params}, *args, method=method, **kwargs)  # type: ignore[assignment]
    return result
