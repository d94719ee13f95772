"""Stage 2 of the `tiny` preset, on the videos that `crosslmm demo` wrote.

Run: crosslmm train configs/tiny_stage1.py, then: crosslmm train configs/tiny_stage2.py
"""

from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.demo import recipe


def get_config() -> ExperimentConfig:
    """The demo's own stage 2: everything learns on questions and answers, in a minute or two."""
    return recipe.stage2(
        Path("runs/demo"), out=Path("runs/tiny_stage2"), init_from=Path("runs/tiny_stage1/model")
    )
