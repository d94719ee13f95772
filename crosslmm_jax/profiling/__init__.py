"""Sizes, FLOPs, memory and timing of the model."""

from crosslmm_jax.profiling.suite import Outputs, profile

__all__ = [
    "Outputs",
    "profile",
]
