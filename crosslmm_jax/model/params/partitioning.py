"""Logical axes of activations. The model knows only their names; `parallel` maps them to mesh axes."""

import math
from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array

MeshAxes = str | tuple[str, ...] | None
AxisRules = Mapping[str, MeshAxes]


def constrain(x: Array, rules: AxisRules | None, *axes: str | None) -> Array:
    """`x` with a constraint to be sharded as `rules` say for its logical `axes`; without rules, `x` itself.

    Raises:
      KeyError: an axis has no rule; a typo would otherwise leave the array replicated in silence.
      ValueError: not one axis name per dimension.
    """
    if rules is None:
        return x
    if len(axes) != x.ndim:
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {x.shape}")
    spec = jax.sharding.PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_output(x: Array, rules: AxisRules | None, *axes: str | None) -> Array:
    """As `constrain`, for the output of a program. A dimension that does not divide evenly is replicated.

    Within a program XLA pads such a dimension, but jax cannot express an output that is sharded unevenly.
    """
    if rules is None:
        return x
    dividing = (
        None if axis is None or dividing_axes(rules, axis, size) is None else axis
        for axis, size in zip(axes, x.shape, strict=True)
    )  # fmt: skip
    return constrain(x, rules, *dividing)


def dividing_axes(rules: AxisRules, axis: str, size: int) -> MeshAxes:
    """Mesh axes of a logical axis, or None (replicated) where they do not divide `size`."""
    return rules[axis] if size % num_shards(rules, axis) == 0 else None


def map_devices(
    function: Callable[..., Array], q: Array, k: Array, v: Array, *ranges: Array | None,
    rules: AxisRules | None, axes: tuple[str, str | None],
) -> Array:  # fmt: skip
    """Attention with rows and heads sharded over devices, for kernels, which the compiler cannot shard.

    Args:
      function: (q, k, v, *ranges) -> float[B, T, N, H].
      q: float[B, T, N, H].
      k: float[B, S, K, H].
      v: float[B, S, K, H].
      ranges: int32[B, T] each, or None.
      rules: logical axis to mesh axes of the mesh in use, or None on one device.
      axes: logical axes of B and of the heads; one whose mesh axes do not divide it is replicated.
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
    """Devices over which a logical axis is sharded, in the mesh in use; 1 without rules."""
    if rules is None:
        return 1
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in as_tuple(rules[axis]))


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """Mesh axes as a tuple, which is empty for None."""
    return (axes,) if isinstance(axes, str) else axes or ()
