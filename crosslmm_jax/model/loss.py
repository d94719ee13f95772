"""Next-token cross-entropy that never holds the logits of a long sequence."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from crosslmm_jax.model.ops import matmul

# Positions of the batch whose logits exist at once: 512 x 152,064 float32 are 311 MB.
LOGITS_AT_ONCE = 512


class Scores(NamedTuple):
    """Sums over the targets of a batch."""

    loss: Float[Array, ""]  # cross-entropies, in nats
    hits: Float[Array, ""]  # targets that are the most probable token, given the tokens before them
    weight: Float[Array, ""]  # targets


def next_token_loss(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    tokens: Int[Array, "b t"],
    loss_mask: Float[Array, "b t"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of weighted cross-entropies in nats, and the sum of the weights.

    Token t is predicted from hidden state t - 1 and has weight `loss_mask[t]`. Logits are float32. They are
    computed chunk by chunk, again in the backward pass, and not at all for chunks without a target.
    """
    return _sum_over_chunks(chunk_loss, lambda *_: jnp.float32(0), hidden, head, tokens, loss_mask)


def next_token_scores(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    tokens: Int[Array, "b t"],
    loss_mask: Float[Array, "b t"],
) -> Scores:
    """As `next_token_loss`, and how many targets are the most probable token."""
    (loss, hits), weight = _sum_over_chunks(
        _chunk_scores, lambda *_: (jnp.float32(0), jnp.float32(0)), hidden, head, tokens, loss_mask
    )
    return Scores(loss, hits, weight)


def _sum_over_chunks(
    of_chunk: Callable[..., PyTree[Array]],
    of_none: Callable[..., PyTree[Array]],
    hidden: Array,
    head: Array,
    tokens: Array,
    loss_mask: Array,
) -> tuple[PyTree[Array], Float[Array, ""]]:
    """The sum of `of_chunk(hidden, targets, weights, head)` over all chunks, and the sum of the weights.

    `of_none` gives zeros of the same types, for a chunk without a target.
    """
    hidden, targets, weights = hidden[:, :-1], tokens[:, 1:], loss_mask[:, 1:]
    batch, length = targets.shape
    chunk = max(1, min(length, LOGITS_AT_ONCE // batch))
    count = -(-length // chunk)
    pad = count * chunk - length

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def body(total: PyTree, inputs: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
        any_target = jnp.any(inputs[2] > 0)
        found = jax.lax.cond(any_target, of_chunk, of_none, *inputs, head)
        return jax.tree.map(jnp.add, total, found), None

    total, _ = jax.lax.scan(
        jax.checkpoint(body, prevent_cse=False),
        of_none(),
        (split(hidden), split(targets), split(weights)),
    )
    return total, jnp.sum(weights)


def chunk_loss(
    hidden: Float[Array, "b t d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    head: Float[Array, "d v"],
) -> Float[Array, ""]:
    """Sum of the weighted cross-entropies of one chunk."""
    return _loss_of_logits(logits_of(hidden, head), targets, weights)


def _loss_of_logits(logits: Array, targets: Array, weights: Array) -> Float[Array, ""]:
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target_logits))


def _chunk_scores(hidden: Array, targets: Array, weights: Array, head: Array) -> tuple[Array, Array]:
    """`chunk_loss`, and the sum of the weights of targets that are the most probable token."""
    logits = logits_of(hidden, head)
    hits = jnp.argmax(logits, axis=-1) == targets
    return _loss_of_logits(logits, targets, weights), jnp.sum(weights * hits)


@jax.named_scope("head")
def logits_of(hidden: Float[Array, "b t d"], head: Float[Array, "d v"]) -> Float[Array, "b t v"]:
    """float32[B, T, V] logits of hidden states, which the final norm has been applied to."""
    return matmul(hidden, head, precise=True)
