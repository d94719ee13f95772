"""Next-token cross-entropy that never holds the logits of a long sequence.

On each device, under `shard_map`, with the letters of `model/__init__.py` and

    b  rows of the device              n  targets of the device, first in `order`
    u  positions of a chunk            v  vocabulary entries of the device, V over `tensor`

| step | shape | crosses between devices |
|---|---|---|
| head in the compute dtype | [D, v] of [D / fsdp, v] | gathered once |
| for each chunk of targets: hidden states | [u, D] of [b, T, D] | - |
| logits, float32 | [u, v] | maximum, sum and target's logit: [u] over `tensor` |
| gradient of the hidden states | [u, D] | summed over `tensor`; gathered over `context` |
| gradient of the head, float32 | sum of [D, v] over chunks | once: [D / fsdp, v] by a reduce-scatter |

Loss and gradients come from one pass over the chunks: the gradient of a cross-entropy is linear in what comes
after it, so the backward pass only scales them. Logits are never computed again. Devices that hold the same
rows (those along `context`; all, where B does not divide) share out their targets.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from crosslmm_jax.model.ops import matmul
from crosslmm_jax.model.params.partitioning import AxisRules, as_tuple, dividing_axes

# Positions of a device whose logits exist at once: 512 x 152,064 float32 are 311 MB.
LOGITS_AT_ONCE = 512


class Scores(NamedTuple):
    """Sums over the targets of a batch."""

    loss: Float[Array, ""]  # cross-entropies, in nats
    hits: Float[Array, ""]  # targets that are the most probable token, given the tokens before them
    weight: Float[Array, ""]  # targets


class HeadLayout(NamedTuple):
    """How rows and head lie on the mesh in use, as mesh axes. Without a mesh, all are empty."""

    rows: tuple[str, ...] = ()  # B is sharded over them
    shared: tuple[str, ...] = ()  # their devices hold the same rows and share out the targets
    vocabulary: tuple[str, ...] = ()  # V is sharded over them, and stays so
    gathered: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # D and V are also sharded over them

    @classmethod
    def of(cls, rules: AxisRules | None, batch: int, head: tuple[int, int]) -> "HeadLayout":
        """The layout of `batch` rows and of a head of shape [D, V], which is that of its parameter.

        A dimension of the head that its mesh axes do not divide leaves them to the other dimension.
        """
        sizes = jax.sharding.get_abstract_mesh().shape
        if rules is None or math.prod(sizes.values()) == 1:
            return cls()
        rows = as_tuple(dividing_axes(rules, "act_batch", batch))
        width, vocabulary = as_tuple(rules["act_head_width"]), as_tuple(rules["act_vocab"])
        of_width, of_vocabulary = (math.prod(sizes[name] for name in names) for names in (width, vocabulary))
        gathered, kept = (width, ()), vocabulary
        if head[1] % of_vocabulary:
            both = head[0] % (of_width * of_vocabulary) == 0
            gathered, kept = ((*width, *vocabulary) if both else width, ()), ()
        if head[0] % of_width:
            divides = head[1] % ((of_vocabulary if kept else 1) * of_width) == 0
            gathered = ((), width if divides else ())
        targets = (*as_tuple(rules["act_batch"]), *as_tuple(rules["act_context"]), *vocabulary)
        shared = tuple(name for name in targets if name not in (*rows, *kept))
        return cls(rows, shared, kept, gathered)

    @property
    def head(self) -> PartitionSpec:
        """The sharding of the head [D, V]."""
        entries = (self.gathered[0], (*self.vocabulary, *self.gathered[1]))
        return PartitionSpec(*(names or None for names in entries))


class _Sums(NamedTuple):
    """What the loop over chunks adds up or fills; None: not asked for."""

    loss: Float[Array, ""]
    hits: Float[Array, ""] | None = None
    hidden: Float[Array, "n d"] | None = None  # gradient of the n targets' hidden states
    head: Float[Array, "d v"] | None = None  # gradient, float32


class _Wanted(NamedTuple):
    """What is computed besides the loss."""

    hits: bool = False
    hidden: bool = False
    head: bool = False


def next_token_loss(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    tokens: Int[Array, "b t"],
    loss_mask: Float[Array, "b t"],
    rules: AxisRules | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of weighted cross-entropies in nats, and the sum of the weights.

    Token t is predicted from hidden state t - 1 and has weight `loss_mask[t]`. Logits are float32. Only
    positions with a weight above 0 pass through the head, `LOGITS_AT_ONCE` at a time on each device.

    Args:
      hidden: hidden states after the final norm, in the compute dtype.
      head: the parameter, float32 in training; its products are in the compute dtype. Its gradient is
        summed in float32 over all targets and devices.
      tokens: token ids.
      loss_mask: weights.
      rules: logical axis -> mesh axes; None on one device.
    """
    layout = HeadLayout.of(rules, hidden.shape[0], (head.shape[0], head.shape[1]))
    return _loss(hidden, head, *_targets(tokens, loss_mask), layout)


def next_token_scores(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    tokens: Int[Array, "b t"],
    loss_mask: Float[Array, "b t"],
    rules: AxisRules | None = None,
) -> Scores:
    """As `next_token_loss`, and how many targets are the most probable token. It has no gradient."""
    layout = HeadLayout.of(rules, hidden.shape[0], (head.shape[0], head.shape[1]))
    targets, weights = _targets(tokens, loss_mask)
    return _on_mesh(hidden, head, targets, weights, layout, _Wanted(hits=True))[0]


def _targets(tokens: Array, loss_mask: Array) -> tuple[Int[Array, "b t"], Float[Array, "b t"]]:
    """The token that follows each position and its weight; the last position has none."""
    shifted = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, loss_mask.astype(jnp.float32)))
    targets, weights = shifted
    return targets, weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(
    hidden: Array, head: Array, targets: Array, weights: Array, layout: HeadLayout
) -> tuple[Array, Array]:
    scores = _on_mesh(hidden, head, targets, weights, layout, _Wanted())[0]
    return scores.loss, scores.weight


def _loss_forward(
    hidden: CustomVJPPrimal, head: CustomVJPPrimal, targets: CustomVJPPrimal, weights: CustomVJPPrimal,
    layout: HeadLayout,
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:  # fmt: skip
    wanted = _Wanted(hidden=hidden.perturbed, head=head.perturbed)
    scores, d_hidden, d_head = _on_mesh(
        hidden.value, head.value, targets.value, weights.value, layout, wanted
    )
    return (scores.loss, scores.weight), (d_hidden, d_head)


def _loss_backward(
    layout: HeadLayout, gradients: tuple[Array | None, Array | None], cotangents: tuple[Array, Array]
) -> tuple[Array | None, ...]:
    if isinstance(cotangents[0], jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    scaled = (None if x is None else (cotangents[0] * x).astype(x.dtype) for x in gradients)
    return *scaled, None, None


_loss.defvjp(_loss_forward, _loss_backward, symbolic_zeros=True)


def _on_mesh(
    hidden: Array, head: Array, targets: Array, weights: Array, layout: HeadLayout, wanted: _Wanted
) -> tuple[Scores, Array | None, Array | None]:
    """Sums over all targets of the batch, and the gradients of the loss that are wanted."""
    on_device = functools.partial(_on_device, layout=layout, wanted=wanted)
    if layout == HeadLayout():
        return on_device(hidden, head, targets, weights)
    rows = PartitionSpec(layout.rows or None)
    return jax.shard_map(
        on_device,
        in_specs=(rows, layout.head, rows, rows),
        out_specs=(PartitionSpec(), rows, layout.head),
        check_vma=False,
    )(hidden, head, targets, weights)


def _on_device(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    *,
    layout: HeadLayout,
    wanted: _Wanted,
) -> tuple[Scores, Array | None, Array | None]:
    """A device's part of `_on_mesh`: its rows, and its shard of the head."""
    shape, dtype = hidden.shape, hidden.dtype
    with jax.named_scope("head"):
        gathered = head.astype(dtype)
        for axis, names in enumerate(layout.gathered):
            gathered = jax.lax.all_gather(gathered, names, axis=axis, tiled=True) if names else gathered
    hidden, targets, weights = (x.reshape(-1, *x.shape[2:]) for x in (hidden, targets, weights))
    # Positions with a target first; device k of c that hold these rows takes number k, k + c, ... of them.
    order = jnp.argsort(weights <= 0, stable=True)
    count = jnp.sum(weights > 0)
    devices, device = _size(layout.shared), jax.lax.axis_index(layout.shared) if layout.shared else 0
    length = -(-len(order) // devices)
    chunk = min(LOGITS_AT_ONCE, length)
    length = -(-length // chunk) * chunk
    mine = jnp.pad(order, (0, length * devices - len(order))).reshape(length, devices)[:, device]

    def add(index: Array, sums: _Sums) -> _Sums:
        slots = jax.lax.dynamic_slice_in_dim(mine, index * chunk, chunk)
        number = (index * chunk + jnp.arange(chunk)) * devices + device
        chunk_weights = jnp.where(number < count, weights[slots], 0)
        return _add_chunk(
            sums, hidden[slots], gathered, targets[slots], chunk_weights, index * chunk, layout.vocabulary
        )

    zero = jnp.zeros((), jnp.float32)
    start = _Sums(
        zero,
        zero if wanted.hits else None,
        jnp.zeros((length, shape[-1]), dtype) if wanted.hidden else None,
        jnp.zeros(gathered.shape, jnp.float32) if wanted.head else None,
    )
    # All devices run as many chunks as the one with most: those along `tensor` meet in each of them.
    axes = (*layout.rows, *layout.shared, *layout.vocabulary)
    chunks = _all(jax.lax.pmax, -(-count // (devices * chunk)), axes)
    sums = jax.lax.fori_loop(0, chunks, add, start)
    token_axes = (*layout.rows, *layout.shared)
    totals = jnp.stack([sums.loss, zero if sums.hits is None else sums.hits, _weight(weights, layout)])
    scores = Scores(*_all(jax.lax.psum, totals, token_axes))
    d_hidden = None
    if sums.hidden is not None:
        found = sums.hidden
        if layout.shared:
            found = jax.lax.all_gather(found, layout.shared, axis=1).reshape(-1, shape[-1])
        place = jnp.argsort(order)  # of each position among those with a target
        d_hidden = jnp.where(weights[:, None] > 0, found[place], 0).reshape(shape)
    return scores, d_hidden, _reduced(sums.head, head, layout)


def _weight(weights: Array, layout: HeadLayout) -> Float[Array, ""]:
    """The sum of the weights, on one of the devices that hold the same rows and 0 on the others."""
    total = jnp.sum(weights)
    return jnp.where(jax.lax.axis_index(layout.shared) == 0, total, 0) if layout.shared else total


def _reduced(gradient: Array | None, head: Array, layout: HeadLayout) -> Array | None:
    """The gradient of a device's shard of the head, summed over all devices in float32."""
    if gradient is None:
        return None
    total: Array = gradient
    for axis, names in enumerate(layout.gathered):
        if names:
            total = jax.lax.psum_scatter(total, names, scatter_dimension=axis, tiled=True)
    scattered = (*layout.gathered[0], *layout.gathered[1])
    rest = tuple(name for name in (*layout.rows, *layout.shared) if name not in scattered)
    return _all(jax.lax.psum, total, rest).astype(head.dtype)


def _add_chunk(
    sums: _Sums,
    hidden: Float[Array, "u d"],
    head: Float[Array, "d v"],
    targets: Int[Array, " u"],
    weights: Float[Array, " u"],
    begin: Array,
    axes: tuple[str, ...],
) -> _Sums:
    """`sums` with one chunk of targets, from number `begin` on.

    V is sharded over the mesh axes `axes`.
    """
    logits = logits_of(hidden, head)
    first = jax.lax.axis_index(axes) * head.shape[1] if axes else 0
    entry = jnp.arange(head.shape[1])
    is_target = entry == (targets - first)[:, None]
    most = jnp.max(logits, axis=-1)
    highest = _all(jax.lax.pmax, most, axes)
    of_target = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    exponentials = jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1)
    of_target, exponentials = _all(jax.lax.psum, jnp.stack([of_target, exponentials]), axes)
    normaliser = highest + jnp.log(exponentials)
    sums = sums._replace(loss=sums.loss + jnp.sum(weights * (normaliser - of_target)))
    if sums.hits is not None:
        best = jnp.where(most == highest, first + jnp.argmax(logits, axis=-1), jnp.iinfo(jnp.int32).max)
        is_hit = _all(jax.lax.pmin, best, axes) == targets
        sums = sums._replace(hits=sums.hits + jnp.sum(weights * is_hit))
    if sums.hidden is None and sums.head is None:
        return sums
    # Of the loss by the logits: float32[u, v].
    gradient = weights[:, None] * (jnp.exp(logits - normaliser[:, None]) - is_target)
    if sums.hidden is not None:
        of_hidden = jnp.matmul(gradient.astype(head.dtype), head.T, preferred_element_type=jnp.float32)
        of_hidden = _all(jax.lax.psum, of_hidden, axes).astype(hidden.dtype)
        put = jax.lax.dynamic_update_slice_in_dim(sums.hidden, of_hidden, begin, 0)
        sums = sums._replace(hidden=put)
    if sums.head is not None:
        # In float32 (TF32 on a GPU): rounded to bfloat16, the gradient of the logits alone would cost 0.1%.
        sums = sums._replace(head=sums.head + jnp.matmul(hidden.T.astype(jnp.float32), gradient))
    return sums


def _size(axes: tuple[str, ...]) -> int:
    """Devices along mesh axes."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes)


def _all(reduce: Callable[..., Array], x: Array, axes: tuple[str, ...]) -> Array:
    """`x` reduced over mesh axes, if there are any."""
    return reduce(x, axes) if axes else x


@jax.named_scope("head")
def logits_of(hidden: Float[Array, "*a d"], head: Float[Array, "d v"]) -> Float[Array, "*a v"]:
    """float32[..., V] logits of hidden states, which the final norm has been applied to."""
    return matmul(hidden, head.astype(hidden.dtype), precise=True)
