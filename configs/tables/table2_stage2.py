"""Stage 2 of the paper's ablations (table 2): 2B, 1 token per frame, LLaVA-Video-178K; everything learns.

The row with V2V and T2V of table 2a, K=4 of 2b and "PT no, SFT yes" of 2c: 48.7 on VideoMME, 49.9 on MVBench.

Run: crosslmm data index configs/tables/llava_video_178k.yaml --out data/llava_video_178k/index \
         --tokenizer models/crosslmm_2b
then: crosslmm train configs/tables/table2_stage2.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """`stage2_instruct.py` on one data set, from `table2_stage1.py`."""
    base = load_experiment(Path(__file__).parent.with_name("stage2_instruct.py"))
    merge = dataclasses.replace(base.model.merge, grid=1)  # sec. 4.4: 1 token
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, merge=merge),
        data=dataclasses.replace(base.data, index="data/llava_video_178k/index"),
        stage=dataclasses.replace(base.stage, steps=10_433),  # one epoch of 1,335,500 rows at 128 per step
        run=dataclasses.replace(base.run, out="runs/table2_stage2", init_from="runs/table2_stage1/model"),
    )
