"""Logical axes of activations. The model knows names only; `parallel` decides what they mean."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

MeshAxes = str | tuple[str, ...] | None
AxisRules = Mapping[str, MeshAxes]


def constrain(x: Array, rules: AxisRules | None, *axes: str | None) -> Array:
    """Asks the compiler to lay `x` out as `rules` say for its logical `axes`; no rules, no request.

    Raises:
      KeyError: an axis has no rule (a typo would otherwise leave the array replicated in silence).
      ValueError: not one axis name a dimension.
    """
    if rules is None:
        return x
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    spec = jax.sharding.PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_output(x: Array, rules: AxisRules | None, *axes: str | None) -> Array:
    """As `constrain`, for what a program returns: jax has no name for a layout that does not divide evenly.

    Within a program, XLA pads what does not divide; a dimension of a result is then held whole instead.
    """
    if rules is None:
        return x
    dividing = (
        None if axis is None or dividing_axes(rules, axis, size) is None else axis
        for axis, size in zip(axes, x.shape, strict=True)
    )  # fmt: skip
    return constrain(x, rules, *dividing)


def dividing_axes(rules: AxisRules, axis: str, size: int) -> MeshAxes:
    """Mesh axes of a logical axis, or None (every device has all of it) where they do not divide `size`."""
    return rules[axis] if size % num_shards(rules, axis) == 0 else None


def map_devices(
    function: Callable[..., Array], q: Array, k: Array, v: Array, *ranges: Any, rules: AxisRules | None,
    axes: tuple[str, str | None],
) -> Array:  # fmt: skip
    """An attention of each device's own rows and heads, for kernels: the compiler cannot divide those itself.

    Args:
      function: (q, k, v, *ranges) -> float[B, T, N, H].
      q: float[B, T, N, H].
      k: float[B, S, K, H].
      v: float[B, S, K, H].
      ranges: int32[B, T] each, or None.
      rules: logical axis to mesh axes of the mesh in use, or None on one device.
      axes: logical axes of B and of the heads; one that does not divide evenly is not divided.
    """
    if rules is None or jax.sharding.get_abstract_mesh().size == 1:
        return function(q, k, v, *ranges)
    batch = dividing_axes(rules, axes[0], q.shape[0])
    heads = None if axes[1] is None else dividing_axes(rules, axes[1], k.shape[2])
    spec = jax.sharding.PartitionSpec
    whole = spec(batch, None, heads, None)
    specs = (whole,) * 3 + (spec(batch, None),) * len(ranges)
    return jax.shard_map(function, in_specs=specs, out_specs=whole, check_vma=False)(q, k, v, *ranges)


def num_shards(rules: AxisRules | None, axis: str) -> int:
    """Devices that share one logical axis under the mesh in use (1 without rules)."""
    if rules is None:
        return 1
    names = rules[axis]
    shape = jax.sharding.get_abstract_mesh().shape
    size = 1
    for name in (names,) if isinstance(names, str) else names or ():
        size *= shape[name]
    return size
