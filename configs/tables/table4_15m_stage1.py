"""Table 4, 15M samples, stage 1. Tokens per frame are not said there; as in `stage1_align.py` 9.

Run: crosslmm train configs/tables/table4_15m_stage1.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """`stage1_align.py` with fewer steps: its shuffled rows end sooner."""
    base = load_experiment(Path(__file__).parent.with_name("stage1_align.py"))
    return dataclasses.replace(
        base,
        stage=dataclasses.replace(base.stage, steps=29_296),  # 15M samples at 512 per step
        run=dataclasses.replace(base.run, out="runs/table4_15m_stage1"),
    )
