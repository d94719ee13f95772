"""Stage 1 of the paper's ablations (table 2): 2B, 1 token per frame, 5M samples; projector and V2V learn.

The row with V2V and T2V of table 2a, K=4 of 2b and "PT no, SFT yes" of 2c; other rows replace a field or two.

Run: crosslmm data index configs/tables/stage1_mixture_5m.yaml --out data/table2/stage1_index \
         --tokenizer models/crosslmm_2b
then: crosslmm train configs/tables/table2_stage1.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """`stage1_align.py` with fewer samples and one token per frame."""
    base = load_experiment(Path(__file__).parent.with_name("stage1_align.py"))
    merge = dataclasses.replace(base.model.merge, grid=1)  # sec. 4.4: 1 token
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, merge=merge),
        data=dataclasses.replace(base.data, index="data/table2/stage1_index"),
        stage=dataclasses.replace(base.stage, steps=9_765),  # sec. 4.4: 5M samples at 512 per step
        run=dataclasses.replace(base.run, out="runs/table2_stage1"),
    )
