"""Table 4, 20M samples, stage 2 on LLaVA-Video-178K: 52.1 on MVBench.

Run: crosslmm train configs/tables/table4_20m_stage2.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """`table2_stage2.py` with 9 tokens per frame, from `table4_20m_stage1.py`."""
    base = load_experiment(Path(__file__).with_name("table2_stage2.py"))
    merge = dataclasses.replace(base.model.merge, grid=3)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, merge=merge),
        run=dataclasses.replace(
            base.run, out="runs/table4_20m_stage2", init_from="runs/table4_20m_stage1/model"
        ),
    )
