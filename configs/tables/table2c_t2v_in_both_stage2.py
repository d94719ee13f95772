"""Table 2c, "PT yes, SFT yes", stage 2: 48.0 on VideoMME, 47.8 on MVBench.

Run: crosslmm train configs/tables/table2c_t2v_in_both_stage2.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """Only the weights to start from differ."""
    base = load_experiment(Path(__file__).with_name("table2_stage2.py"))
    return dataclasses.replace(
        base,
        run=dataclasses.replace(
            base.run, out="runs/table2c_t2v_in_both_stage2", init_from="runs/table2c_t2v_in_both_stage1/model"
        ),
    )
