"""Table 2a without V2V and T2V (table 2b, None), stage 1: the projector learns alone.

Run: crosslmm train configs/tables/table2a_none_stage1.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """No cross-attention in the graph. Also the first stage of the row with T2V alone."""
    base = load_experiment(Path(__file__).with_name("table2_stage1.py"))
    return dataclasses.replace(
        base,
        stage=dataclasses.replace(base.stage, trainable=("projector",), directions=()),
        run=dataclasses.replace(base.run, out="runs/table2a_none_stage1"),
    )
