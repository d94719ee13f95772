"""Table 2b, K=2, stage 2: 48.5 on VideoMME, 49.7 on MVBench.

Run: crosslmm train configs/tables/table2b_k2_stage2.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """From `table2b_k2_stage1.py`."""
    base = load_experiment(Path(__file__).with_name("table2_stage2.py"))
    cross = dataclasses.replace(base.model.cross_attention, cross_attn_every=2)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, cross_attention=cross),
        run=dataclasses.replace(
            base.run, out="runs/table2b_k2_stage2", init_from="runs/table2b_k2_stage1/model"
        ),
    )
