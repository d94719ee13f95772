"""The decoder's layers as one scan over groups of `cross_attn_every`, wherever cross-attention sits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Carry = Any
Weights = Any


class Placement(NamedTuple):
    """Which of `num_layers` layers carry cross-attention: `offset`, `offset + every`, ..."""

    num_layers: int
    every: int
    offset: int


def scan_layers(
    plain: Callable[[Carry, Weights], Carry],
    crossed: Callable[[Carry, Weights, Weights], Carry],
    carry: Carry,
    layers: Weights,
    cross: Weights,
    *,
    placement: Placement,
    remat: bool,
) -> Carry:
    """Runs all layers in order, as training does: compiled once a group, whatever the depth.

    A group is written out, groups are scanned. Placements that do not divide evenly have plain layers in
    front (an offset of a whole group or more) and a shorter group behind.

    Args:
      plain: `(carry, layer weights) -> carry`.
      crossed: `(carry, layer weights, cross weights) -> carry`.
      carry: what passes from layer to layer.
      layers: stacked on axis 0, one entry a layer.
      cross: stacked on axis 0, one entry a layer with cross-attention.
      placement: where cross-attention sits.
      remat: recompute each group in the backward pass.
    """
    every = placement.every
    lead = placement.offset // every * every
    at = placement.offset % every
    count, rest = divmod(placement.num_layers - lead, every)

    def group(carry: Carry, weights: tuple[Weights, Weights], size: int = every) -> tuple[Carry, None]:
        layer_group, cross_weights = weights
        for i in range(size):
            layer = _take(layer_group, i)
            carry = crossed(carry, layer, cross_weights) if i == at else plain(carry, layer)
        return carry, None

    wrap = _rematerialised if remat else _as_is
    if lead:
        carry, _ = jax.lax.scan(wrap(lambda c, w: (plain(c, w), None)), carry, _slice(layers, 0, lead))
    if count:
        grouped = jax.tree.map(
            lambda w: w.reshape(count, every, *w.shape[1:]), _slice(layers, lead, lead + count * every)
        )
        carry, _ = jax.lax.scan(wrap(group), carry, (grouped, _slice(cross, 0, count)))
    if rest:
        tail = _slice(layers, placement.num_layers - rest, placement.num_layers)
        weights = (tail, _take(cross, count) if at < rest else None)
        last = functools.partial(group, size=rest)
        carry, _ = (jax.checkpoint(last) if remat else last)(carry, weights)
    return carry


def _as_is(function: Callable) -> Callable:
    return function


def _rematerialised(function: Callable) -> Callable:
    # Inside a scan, and only there, XLA cannot merge what is recomputed with what was computed before.
    return jax.checkpoint(function, prevent_cse=False)


def _take(tree: Weights, index: int) -> Weights:
    return jax.tree.map(lambda w: w[index], tree)


def _slice(tree: Weights, begin: int, end: int) -> Weights:
    """Rows `begin` to `end`; the whole array is passed on untouched."""
    return jax.tree.map(lambda w: w if end - begin == w.shape[0] else w[begin:end], tree)
