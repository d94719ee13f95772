"""Which parts a checkpoint has: a vision tower, an output head of its own."""

import hashlib

import numpy as np

from crosslmm_jax.convert.families import siglip
from crosslmm_jax.convert.families.llava import canonical
from crosslmm_jax.convert.source.files import Source

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_STRIP_ROWS = 4096  # compared at a time


def has_tower(source: Source) -> bool:
    """Whether there are tensors of a vision tower."""
    return any(canonical(name).startswith(siglip.PREFIX) for name in source.tensors)


def has_head(source: Source) -> bool:
    """Whether there is a tensor for the head."""
    return HEAD in map(canonical, source.tensors)


def head_differs(source: Source) -> bool:
    """Whether there is a head with other values than the embedding, if there are both.

    Like transformers, which then keeps both, whatever config.json says. The two tensors are read one after
    the other.
    """
    found = {canonical(name): name for name in source.tensors}
    if HEAD not in found or EMBEDDING not in found:
        return False
    head, embedding = found[HEAD], found[EMBEDDING]
    if source.tensors[head].shape != source.tensors[embedding].shape:
        return True
    return _digest(source.read(head)) != _digest(source.read(embedding))


def _digest(value: np.ndarray) -> bytes:
    """Equal for equal numbers, whatever their type."""
    digest = hashlib.blake2b()
    for begin in range(0, len(value), _STRIP_ROWS):
        strip = value[begin : begin + _STRIP_ROWS].astype(np.float32)
        digest.update((strip + np.float32(0)).tobytes())  # -0 becomes 0
    return digest.digest()
