"""Table 2c, "PT yes, SFT yes", stage 1: T2V learns from captions already.

Run: crosslmm train configs/tables/table2c_t2v_in_both_stage1.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """Projector, V2V and T2V learn."""
    base = load_experiment(Path(__file__).with_name("table2_stage1.py"))
    return dataclasses.replace(
        base,
        stage=dataclasses.replace(
            base.stage, trainable=("projector", "v2v", "t2v"), directions=("v2v", "t2v")
        ),
        run=dataclasses.replace(base.run, out="runs/table2c_t2v_in_both_stage1"),
    )
