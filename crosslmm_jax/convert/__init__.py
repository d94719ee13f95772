"""Weights in and out: the MODEL folder."""

from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.convert.verify import verify

__all__ = [
    "Request",
    "convert_from_hf",
    "convert_to_hf",
    "verify",
]
