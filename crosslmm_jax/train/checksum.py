"""Checksums by which a damaged checkpoint is recognised: Orbax restores flipped bits without an error.

A checksum is a sum of integers, which does not depend on the order: it is the same on any mesh and device.
"""

import math
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_MULTIPLIER = 0x9E3779B1  # odd, about 2**32 over the golden ratio: spreads indices over all bits


def array_checksums(tree: PyTree[Array]) -> dict[str, int]:
    """Path of each array of `tree` -> its checksum, an integer below 2**32.

    A change of a single element always changes it. Other damage is missed with probability 2**-32.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    on_cpu = all(_is_whole_here(array) and array.platform() == "cpu" for array in arrays)
    # On a CPU numpy reads the arrays in place, which saves compiling.
    sums = (
        [_checksum(np, np.asarray(array)) for array in arrays]
        if on_cpu
        else jax.device_get(_on_device(arrays))
    )
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


def _is_whole_here(array: jax.Array) -> bool:
    return array.is_fully_addressable or array.is_fully_replicated


def check_undamaged(restored: Mapping[str, int], saved: Mapping[str, int]) -> None:
    """Raises a ValueError naming the arrays whose checksums differ between `restored` and `saved`."""
    damaged = sorted(path for path in restored if restored[path] != saved.get(path))
    if damaged:
        raise ValueError(f"checksums differ in {', '.join(damaged)}")


@jax.jit
def _on_device(arrays: list[jax.Array]) -> list[Array | np.ndarray]:
    return [_checksum_of_shape(jnp, array) for array in arrays]


def _checksum(xp: ModuleType, array: np.ndarray | jax.Array) -> UInt32[Array | np.ndarray, ""]:
    """The sum over all elements of their bits times an odd number that depends on their index, mod 2**32.

    Args:
      xp: numpy or jax.numpy.
      array: of that module.
    """
    unsigned = _UNSIGNED[array.dtype.itemsize]
    bits = array.view(unsigned) if xp is np else jax.lax.bitcast_convert_type(array, unsigned)
    index = xp.zeros((1,) * array.ndim, np.uint32)
    for axis, size in enumerate(array.shape):
        stride = math.prod(array.shape[axis + 1 :]) % 2**32
        along = xp.arange(size, dtype=np.uint32) * np.uint32(stride)
        index = index + along.reshape((size,) + (1,) * (array.ndim - axis - 1))
    weight = index * np.uint32(_MULTIPLIER) | np.uint32(1)
    return xp.sum(bits.astype(np.uint32) * weight, dtype=np.uint32)


# Traced once for all arrays of a shape: a state has hundreds of arrays, of few shapes.
_checksum_of_shape = jax.jit(_checksum, static_argnums=0)
