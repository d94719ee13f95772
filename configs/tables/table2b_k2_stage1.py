"""Table 2b, K=2, stage 1: cross-attention in every second layer.

Run: crosslmm convert from-hf --vision siglip2-so400m-patch14-384 --llm Qwen2.5-1.5B-Instruct \
         --preset crosslmm_2b --cross-attention.cross-attn-every 2 --out models/crosslmm_2b_k2
then: crosslmm train configs/tables/table2b_k2_stage1.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """The weights to start from have it there too."""
    base = load_experiment(Path(__file__).with_name("table2_stage1.py"))
    cross = dataclasses.replace(base.model.cross_attention, cross_attn_every=2)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, cross_attention=cross),
        run=dataclasses.replace(base.run, out="runs/table2b_k2_stage1", init_from="models/crosslmm_2b_k2"),
    )
