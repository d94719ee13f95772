"""TODO."""

from crosslmm_jax.data.annotations.mixture import read_mixture, read_rows
from crosslmm_jax.data.annotations.rows import MODALITIES, BadEntry, DatasetSpec, Row

__all__ = [
    "MODALITIES",
    "BadEntry",
    "DatasetSpec",
    "Row",
    "read_mixture",
    "read_rows",
]
