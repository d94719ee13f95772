"""The whole path in small: videos, both stages, evaluation, a control, questions."""

from crosslmm_jax.demo.command import run

__all__ = ["run"]
