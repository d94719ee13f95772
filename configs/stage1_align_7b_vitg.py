"""Stage 1 of CrossLMM-7B with the giant encoder and 16 tokens per frame: as `stage1_align_7b.py`.

Run: crosslmm train configs/stage1_align_7b_vitg.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment
from crosslmm_jax.presets import crosslmm_7b_vitg


def get_config() -> ExperimentConfig:
    """The same recipe (table 1, last row, names no other values); 32 frames are 512 tokens."""
    base = load_experiment(Path(__file__).with_name("stage1_align_7b.py"))
    model = crosslmm_7b_vitg()
    vision = dataclasses.replace(model.vision, keep_features=True)  # frozen, as in `stage1_align.py`
    return dataclasses.replace(
        base,
        model=dataclasses.replace(model, vision=vision),
        data=dataclasses.replace(base.data, tokenizer="models/crosslmm_7b_vitg"),
        run=dataclasses.replace(
            base.run, out="runs/stage1_align_7b_vitg", init_from="models/crosslmm_7b_vitg"
        ),
    )
