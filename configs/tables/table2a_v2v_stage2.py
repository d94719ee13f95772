"""Table 2a with V2V alone, and "PT no, SFT no" of 2c, stage 2: 48.4 on VideoMME, 48.9 on MVBench.

Run: crosslmm train configs/tables/table2a_v2v_stage2.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """T2V stays out of the graph."""
    base = load_experiment(Path(__file__).with_name("table2_stage2.py"))
    return dataclasses.replace(
        base,
        stage=dataclasses.replace(base.stage, frozen=("t2v",), directions=("v2v",)),
        run=dataclasses.replace(base.run, out="runs/table2a_v2v_stage2"),
    )
