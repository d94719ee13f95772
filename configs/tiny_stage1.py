"""Stage 1 of the `tiny` preset, on the videos that `crosslmm demo` wrote: a start for your own.

Run: crosslmm demo, then: crosslmm train configs/tiny_stage1.py
"""

from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.demo import recipe


def get_config() -> ExperimentConfig:
    """The demo's own stage 1: projector and V2V learn on captions, in seconds on two CPU cores."""
    return recipe.stage1(Path("runs/demo"), out=Path("runs/tiny_stage1"))
