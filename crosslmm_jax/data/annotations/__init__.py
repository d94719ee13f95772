"""TODO."""

from crosslmm_jax.data.annotations.mixture import read_mixture, read_rows
from crosslmm_jax.data.annotations.rows import MODALITIES, DatasetSpec, Row

__all__ = [
    "MODALITIES",
    "DatasetSpec",
    "Row",
    "read_mixture",
    "read_rows",
]
