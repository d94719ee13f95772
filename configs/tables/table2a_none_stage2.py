"""Table 2a without V2V and T2V (table 2b, None), stage 2: 47.2 on VideoMME, 47.5 on MVBench.

Run: crosslmm train configs/tables/table2a_none_stage2.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """No cross-attention in the graph."""
    base = load_experiment(Path(__file__).with_name("table2_stage2.py"))
    return dataclasses.replace(
        base,
        stage=dataclasses.replace(base.stage, trainable=("encoder", "projector", "decoder"), directions=()),
        run=dataclasses.replace(
            base.run, out="runs/table2a_none_stage2", init_from="runs/table2a_none_stage1/model"
        ),
    )
