"""Table 2a with T2V alone, stage 2: 47.3 on VideoMME, 47.7 on MVBench.

Run: crosslmm train configs/tables/table2a_t2v_stage2.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """T2V joins in stage 2 (table 2c), so that stage 1 is that of the row without either."""
    base = load_experiment(Path(__file__).with_name("table2_stage2.py"))
    return dataclasses.replace(
        base,
        stage=dataclasses.replace(base.stage, frozen=("v2v",), directions=("t2v",)),
        run=dataclasses.replace(
            base.run, out="runs/table2a_t2v_stage2", init_from="runs/table2a_none_stage1/model"
        ),
    )
