"""How a module declares its parameters: one line each, with shape, logical axes and initialiser.

Modules own parameters; plain functions do the maths on them. Layers of a stack are stored on a leading
"layers" axis that does not depend on where cross-attention sits, so the same checkpoint serves every
placement.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

Initializer = Callable[[Array, tuple[int, ...]], Array]
WeightTable = Mapping[str, "Weight | WeightTable"]


class Weight(NamedTuple):
    """One parameter: its shape, one logical axis name (or None) a dimension, and its initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer


def normal(std: float) -> Initializer:
    """Gaussian with standard deviation `std`."""
    return partial(_normal, std)


def _normal(std: float, key: Array, shape: tuple[int, ...]) -> Array:
    return std * jax.random.normal(key, shape, jnp.float32)


def fan_in(size: int) -> Initializer:
    """Gaussian that keeps the variance of a sum over `size` inputs."""
    return normal(1 / math.sqrt(size))


def constant(value: float) -> Initializer:
    """Every entry equal to `value`."""
    return partial(_constant, value)


def _constant(value: float, key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.full(shape, value, jnp.float32)


zeros, ones = constant(0.0), constant(1.0)


def stack(length: int, table: Mapping[str, Weight]) -> dict[str, Weight]:
    """The table of `length` layers, stacked on a leading "layers" axis."""
    return {
        name: Weight((length, *weight.shape), ("layers", *weight.axes), weight.init)
        for name, weight in table.items()
    }


def declare(module: nn.Module, table: WeightTable) -> dict[str, Any]:
    """Declares every parameter of `table` on `module` and returns their values under the same names."""
    return {name: module.param(name, partial(_initialise, entry)) for name, entry in table.items()}


def _initialise(entry: "Weight | WeightTable", key: Array) -> Any:
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


def cast(weights: Any, dtype: Any) -> Any:
    """Matrices and biases in the compute dtype; norms and gates stay as stored (float32 master copies)."""

    def cast_leaf(path: tuple[Any, ...], value: Array) -> Array:
        name = path[-1].key
        return value if "norm" in name or name == "gate" else value.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast_leaf, weights)
