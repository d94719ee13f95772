"""TODO."""

from crosslmm_jax.data.tfds_export.to_tfds import to_tfds

__all__ = [
    "to_tfds",
]
