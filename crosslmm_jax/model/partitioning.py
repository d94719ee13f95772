"""Logical axes of activations. The model knows names only; `parallel` decides what they mean."""

from collections.abc import Mapping

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
