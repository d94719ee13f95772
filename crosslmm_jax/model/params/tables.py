"""How a module declares its parameters: one line each, with shape, logical axes and initialiser.

Modules hold parameters; plain functions compute with them. There are two forms of a stack of layers:

- Stacked, on a leading "layers" axis: what training scans, checkpoints hold and converters fill. It does not
  depend on where cross-attention is, so that one checkpoint serves every placement.
- Separate, with arrays per layer (`separate_layers`): what inference reads. XLA would copy a layer out of a
  stack before a matrix product reads it.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

Initializer = Callable[[Array, tuple[int, ...]], Array]
WeightTable = Mapping[str, "Weight | WeightTable"]
Params = dict[str, PyTree[Array]]  # nested dicts of parameters, or of their shapes or shardings
AxisTree = dict[str, Any]  # the same nested dicts of tuples of logical axis names


class Weight(NamedTuple):
    """One parameter: its shape, one logical axis (or None) per dimension, and its initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer


def normal(std: float) -> Initializer:
    """Gaussian with standard deviation `std`, float32."""
    return partial(nn.initializers.normal(std), dtype=jnp.float32)


def fan_in(size: int) -> Initializer:
    """Gaussian that keeps the variance of a sum over `size` inputs."""
    return normal(1 / math.sqrt(size))


def uniform(bound: float) -> Initializer:
    """Uniform within -bound..bound, float32."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return init


def constant(value: float) -> Initializer:
    """Every entry equal to `value`, float32."""
    return partial(nn.initializers.constant(value), dtype=jnp.float32)


zeros, ones = constant(0.0), constant(1.0)


def input_dims(name: str) -> int:
    """Leading dimensions of a matrix that a product sums over; the others are outputs."""
    return 2 if name == "wo" else 1  # of attention: heads and their size


def stack(length: int, table: Mapping[str, Weight], *, stacked: bool = True) -> WeightTable:
    """The table of `length` layers: stacked on a leading "layers" axis, or one table per layer number."""
    if not stacked:
        return {str(index): table for index in range(length)}
    return {
        name: Weight((length, *weight.shape), ("layers", *weight.axes), weight.init)
        for name, weight in table.items()
    }


def layer_of(layers: Mapping[str, Any], index: int) -> Params:
    """The weights of one layer of a stack, in either form."""
    if str(index) in layers:
        return dict(layers[str(index)])
    return jax.tree.map(lambda w: w[index], dict(layers))


def separate_layers(params: Params, *, consume: bool = False) -> Params:
    """Parameters with separate arrays per layer instead of stacks: for `CrossLMM(..., stacked=False)`.

    Args:
      params: of `init_params`, or some of its parts; arrays keep their sharding. May be shapes
        (`jax.ShapeDtypeStruct`).
      consume: remove each stack from `params` once its layers are copied, so that at most one stack exists
        twice, if nothing else refers to them.
    """
    separated = dict(params)
    for part, weights in params.items():
        if part in ("v2v", "t2v"):
            separated[part] = _separate(weights, consume)
        elif "layers" in weights:
            separated[part] = {**weights, "layers": _separate(weights["layers"], consume)}
    return separated


def _separate(stack: Params, consume: bool) -> Params:
    layers: Params = {}
    for name in list(stack):
        rows = _rows(stack.pop(name) if consume else stack[name])
        if consume:
            jax.block_until_ready(rows)
        for index, row in enumerate(rows):
            layers.setdefault(str(index), {})[name] = row
    return layers


def _rows(array: Array | jax.ShapeDtypeStruct) -> Sequence[Array | jax.ShapeDtypeStruct]:
    """The rows of an array, each a copy with the sharding of the other dimensions."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(array.shape[1:], array.dtype)] * array.shape[0]
    sharding = array.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.jit(list, out_shardings=[sharding] * array.shape[0])(array)


def declare(module: nn.Module, table: WeightTable) -> Params:
    """Declares every parameter of `table` on `module` and returns their values under the same names.

    Raises:
      ValueError: a parameter that `module` is applied with is missing or has another shape.
    """
    return {name: _declare(module, name, entry) for name, entry in table.items()}


def _declare(module: nn.Module, name: str, entry: "Weight | WeightTable") -> PyTree[Array]:
    if not module.has_variable("params", name):  # Linen makes it, or says what is missing
        return module.param(name, partial(_initialise, entry))
    # `module.param` would check shapes by tracing all initialisers: most of the time that tracing a program
    # of many separate layers took.
    value = nn.meta.unbox(module.get_variable("params", name))
    _check_shapes(entry, value, (*module.path, name))
    return value


def _check_shapes(entry: "Weight | WeightTable", value: PyTree[Array], path: tuple[str, ...]) -> None:
    if isinstance(entry, Weight):
        shape = value.shape  # also of an `Adapted` matrix
        if shape != entry.shape:
            raise ValueError(f"parameter {'.'.join(path)} has shape {shape} instead of {entry.shape}")
        return
    for name, child in entry.items():
        if name not in value:
            raise ValueError(f"parameter {'.'.join((*path, name))} is missing")
        _check_shapes(child, value[name], (*path, name))


def _initialise(entry: Weight | WeightTable, key: Array) -> nn.LogicallyPartitioned | Params:
    if isinstance(entry, Weight):
        if len(entry.shape) != len(entry.axes):
            raise ValueError(f"shape {entry.shape} and logical axes {entry.axes} differ in length")
        return nn.LogicallyPartitioned(entry.init(key, entry.shape), entry.axes)
    return {
        name: _initialise(child, jax.random.fold_in(key, zlib.crc32(name.encode())))
        for name, child in entry.items()
    }


def is_decayed(path: tuple[str, ...]) -> bool:
    """Whether weight decay applies to the parameter at `path`: never to norms, biases and gates."""
    name = path[-1]
    is_bias = name in ("bq", "bk", "bv", "bo", "b1", "b2") or name.endswith("_bias")
    return not (is_bias or "norm" in name or name == "gate")


def has_own_dtype(name: str, dtype: DTypeLike) -> bool:
    """Whether `cast` leaves a parameter as it is: norms, gates, 8-bit matrices and their scales."""
    return "norm" in name or name == "gate" or name.endswith("_scale") or jnp.dtype(dtype).itemsize == 1


def cast(weights: Params, dtype: DTypeLike) -> Params:
    """`weights` with matrices and biases in the compute dtype; see `has_own_dtype` for the others."""

    def cast_leaf(path: Sequence[Any], value: Array) -> Array:
        name = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)][-1]
        return value if has_own_dtype(name, value.dtype) else value.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, weights)
