"""Next-token cross-entropy that never holds the logits of a long sequence."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.model.ops import matmul

# Positions of the batch whose logits exist at once: 512 x 152,064 float32 are 311 MB.
LOGITS_AT_ONCE = 512


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
    hidden, targets, weights = hidden[:, :-1], tokens[:, 1:], loss_mask[:, 1:]
    batch, length = targets.shape
    chunk = max(1, min(length, LOGITS_AT_ONCE // batch))
    count = -(-length // chunk)
    pad = count * chunk - length

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def body(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        any_target = jnp.any(inputs[2] > 0)
        loss = jax.lax.cond(any_target, chunk_loss, lambda *_: jnp.float32(0), *inputs, head)
        return total + loss, None

    total, _ = jax.lax.scan(
        jax.checkpoint(body, prevent_cse=False),
        jnp.float32(0),
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
    logits = logits_of(hidden, head)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target_logits))


@jax.named_scope("head")
def logits_of(hidden: Float[Array, "b t d"], head: Float[Array, "d v"]) -> Float[Array, "b t v"]:
    """float32[B, T, V] logits of hidden states, which the final norm has been applied to."""
    return matmul(hidden, head, precise=True)
