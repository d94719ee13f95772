"""Stage 2 of CrossLMM-7B: `stage2_instruct.py` with the larger language model (sec. 4.1).

Run: crosslmm train configs/stage2_instruct_7b.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment
from crosslmm_jax.presets import crosslmm_7b


def get_config() -> ExperimentConfig:
    """The 2B recipe; the paper names no other values for 7B."""
    small = load_experiment(Path(__file__).with_name("stage2_instruct.py"))
    model = dataclasses.replace(crosslmm_7b(), vision=small.model.vision)
    data = dataclasses.replace(small.data, tokenizer="models/crosslmm_7b")
    run = dataclasses.replace(
        small.run, out="runs/stage2_instruct_7b", init_from="runs/stage1_align_7b/model"
    )
    return dataclasses.replace(small, model=model, data=data, run=run)
