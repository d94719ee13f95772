"""Training: what learns, how fast, one pure step, checkpoints, and the loop that holds them together."""

from crosslmm_jax.train.loop import train
from crosslmm_jax.train.state import abstract_state, random_state
from crosslmm_jax.train.step import compile_train_step, with_step_visibility

__all__ = [
    "abstract_state",
    "compile_train_step",
    "random_state",
    "train",
    "with_step_visibility",
]
