"""A checksum of every array of a state: Orbax restores flipped bits in a data file without a word.

Sums of integers do not depend on their order, so a checksum is the same on any mesh and any device.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_MULTIPLIER = 0x9E3779B1  # odd, about 2**32 over the golden ratio: spreads indices over all bits


def checksums(tree: Any) -> dict[str, int]:
    """Path of each array of `tree` -> its checksum, an integer below 2**32.

    Any change of a single element changes it; other damage goes unseen once in 2**32 times.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    on_cpu = all(array.is_fully_addressable and array.platform() == "cpu" for array in arrays)
    # On a CPU numpy reads the arrays in place, which saves compiling.
    sums = (
        [_checksum(np, np.asarray(array)) for array in arrays]
        if on_cpu
        else jax.device_get(_on_device(arrays))
    )
    return {jax.tree_util.keystr(path): int(value) for (path, _), value in zip(leaves, sums, strict=True)}


@jax.jit
def _on_device(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_checksum(jnp, array) for array in arrays]


def _checksum(xp: Any, array: Any) -> Any:
    """The sum over all elements of their bits times an odd number that depends on their place, mod 2**32."""
    unsigned = _UNSIGNED[array.dtype.itemsize]
    bits = array.view(unsigned) if xp is np else jax.lax.bitcast_convert_type(array, unsigned)
    index = xp.zeros((1,) * array.ndim, np.uint32)
    for axis, size in enumerate(array.shape):
        stride = math.prod(array.shape[axis + 1 :]) % 2**32
        along = xp.arange(size, dtype=np.uint32) * np.uint32(stride)
        index = index + along.reshape((size,) + (1,) * (array.ndim - axis - 1))
    weight = index * np.uint32(_MULTIPLIER) | np.uint32(1)
    return xp.sum(bits.astype(np.uint32) * weight, dtype=np.uint32)
