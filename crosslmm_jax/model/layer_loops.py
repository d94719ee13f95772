"""The two ways to run the decoder's layers: scanned, as training does, and one by one, as inference does."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
from jaxtyping import Array, PyTree

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.params.tables import layer_of

Cache = TypeVar("Cache")
Carry = TypeVar("Carry")
Output = TypeVar("Output")
Shared = TypeVar("Shared")
Weights = PyTree[Array]


class Placement(NamedTuple):
    """Which of `num_layers` layers carry cross-attention: `offset`, `offset + every`, ..."""

    num_layers: int
    every: int
    offset: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Placement":
        """The placement that a configuration asks for."""
        cross = config.cross_attention
        return cls(config.decoder.num_layers, cross.cross_attn_every, cross.cross_attn_offset)

    def cross_index(self, layer: int) -> int | None:
        """Number of a layer among those with cross-attention; None: it is not one of them."""
        index, rest = divmod(layer - self.offset, self.every)
        return index if rest == 0 and index >= 0 else None


def each_layer(
    layer: Callable[[Carry, Weights, Weights | None, Cache, Shared], tuple[Carry, Output]],
    carry: Carry,
    layers: Mapping[str, Weights],
    cross: Mapping[str, Mapping[str, Weights]],
    caches: Sequence[Cache],
    shared: Shared,
    *,
    placement: Placement,
) -> tuple[Carry, list[Output]]:
    """Runs all layers one by one and keeps what each of them returns.

    `layer` is traced and lowered once with and once without cross-attention, at any depth: it becomes a
    function of the program that every layer calls. XLA inlines the calls before it optimises. So all arrays
    that `layer` reads must be arguments; what it closes over must be the same for all layers.

    Args:
      layer: `(carry, layer weights, cross weights or None, entry of caches, shared) -> (carry, output)`.
      carry: what passes from layer to layer.
      layers: stacked on axis 0, or one entry per layer by number.
      cross: the same per direction, for the layers with cross-attention.
      caches: what belongs to one layer, one entry per layer.
      shared: what all layers read.
      placement: where cross-attention sits.
    """
    run, outputs = jax.jit(layer), []
    for index, cache in zip(range(placement.num_layers), caches, strict=True):
        number, cross_weights = placement.cross_index(index), None
        if number is not None:
            cross_weights = {direction: layer_of(weights, number) for direction, weights in cross.items()}
        carry, output = run(carry, layer_of(layers, index), cross_weights, cache, shared)
        outputs.append(output)
    return carry, outputs


def scan_layers(
    layer: Callable[[Carry, Weights, Weights | None], Carry],
    carry: Carry,
    layers: Weights,
    cross: Weights,
    *,
    placement: Placement,
    remat: bool,
) -> Carry:
    """Runs all layers as one scan over groups of `every` layers: compiled once per group, at any depth.

    Inside a group, layers are written out. A placement that does not divide evenly has layers without
    cross-attention before the groups (an offset of a whole group or more) and a shorter group after them.

    Args:
      layer: `(carry, layer weights, cross weights or None) -> carry`.
      carry: what passes from layer to layer.
      layers: stacked on axis 0, one entry per layer.
      cross: stacked on axis 0, one entry per layer with cross-attention.
      placement: where cross-attention sits.
      remat: recompute each group in the backward pass.
    """
    every = placement.every
    lead = placement.offset // every * every
    at = placement.offset % every
    count, rest = divmod(placement.num_layers - lead, every)

    def leading(carry: Carry, weights: Weights) -> tuple[Carry, None]:
        return layer(carry, weights, None), None

    def group(carry: Carry, weights: tuple[Weights, Weights], size: int = every) -> tuple[Carry, None]:
        layer_group, cross_weights = weights
        for i in range(size):
            carry = layer(carry, _take(layer_group, i), cross_weights if i == at else None)
        return carry, None

    wrap = _rematerialised if remat else _as_is
    if lead:
        carry, _ = jax.lax.scan(wrap(leading), carry, _slice(layers, 0, lead))
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
