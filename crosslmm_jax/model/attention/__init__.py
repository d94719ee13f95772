"""Attention: one function, its backends beside it."""

from crosslmm_jax.model.attention.dispatch import Backend, attention, reference_attention

__all__ = ["Backend", "attention", "reference_attention"]
