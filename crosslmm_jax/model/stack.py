"""The decoder's layers as one scan over groups of `cross_attn_every`, wherever cross-attention sits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Carry = Any
Weights = Any


class Placement(NamedTuple):
    """Which of `num_layers` layers carry cross-attention: `offset`, `offset + every`, ..."""

    num_layers: int
    every: int
    offset: int


def scan_layers(
    plain: Callable[[Carry, Weights], Carry],
    crossed: Callable[[Carry, Weights, Weights], tuple[Carry, Any]],
    carry: Carry,
    layers: Weights,
    cross: Weights,
    *,
    placement: Placement,
    remat: bool,
) -> tuple[Carry, Any]:
    """Runs all layers in order.

    A group is written out, groups are scanned: one compiled body of `every` layers, and every layer's
    weights are read in place from their stack. Placements that do not divide evenly have plain layers in
    front (an offset of a whole group or more) and a shorter group behind.

    Args:
      plain: `(carry, layer weights) -> carry`.
      crossed: `(carry, layer weights, cross weights) -> (carry, output)`.
      carry: what passes from layer to layer.
      layers: stacked on axis 0, one entry a layer.
      cross: stacked on axis 0, one entry a layer with cross-attention.
      placement: where cross-attention sits.
      remat: recompute each group in the backward pass.

    Returns:
      The last carry, and the outputs of `crossed` stacked over the layers with cross-attention.
    """
    every = placement.every
    lead = placement.offset // every * every
    at = placement.offset % every
    count, rest = divmod(placement.num_layers - lead, every)

    def group(carry: Carry, weights: tuple[Weights, Weights], size: int = every) -> tuple[Carry, Any]:
        layer_group, cross_weights = weights
        output = None
        for i in range(size):
            layer = _take(layer_group, i)
            if i == at:
                carry, output = crossed(carry, layer, cross_weights)
            else:
                carry = plain(carry, layer)
        return carry, output

    wrap = _rematerialised if remat else _as_is
    if lead:
        carry, _ = jax.lax.scan(wrap(lambda c, w: (plain(c, w), None)), carry, _slice(layers, 0, lead))
    outputs = []
    if count:
        grouped = jax.tree.map(
            lambda w: w.reshape(count, every, *w.shape[1:]), _slice(layers, lead, lead + count * every)
        )
        carry, output = jax.lax.scan(wrap(group), carry, (grouped, _slice(cross, 0, count)))
        outputs.append(output)
    if rest:
        tail = _slice(layers, placement.num_layers - rest, placement.num_layers)
        has_cross = at < rest
        weights = (tail, _take(cross, count) if has_cross else None)
        carry, output = wrap(lambda c, w: group(c, w, rest))(carry, weights)
        if has_cross:
            outputs.append(jax.tree.map(lambda x: x[None], output))
    return carry, jax.tree.map(
        lambda *parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts), *outputs
    )


def _as_is(function: Callable) -> Callable:
    return function


def _rematerialised(function: Callable) -> Callable:
    # Inside a scan common subexpressions cannot be merged across the boundary anyway.
    return jax.checkpoint(function, prevent_cse=False)


def _take(tree: Weights, index: int) -> Weights:
    return jax.tree.map(lambda w: w[index], tree)


def _slice(tree: Weights, begin: int, end: int) -> Weights:
    """Rows `begin` to `end`; the whole array is passed on untouched."""
    return jax.tree.map(lambda w: w if end - begin == w.shape[0] else w[begin:end], tree)
