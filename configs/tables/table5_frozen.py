"""Table 5 with a frozen encoder, stage 2 of 2B: 60.8 on MVBench.

The other row, with a trained encoder, is `stage2_instruct.py`: its 63.5 is what table 1 has for it.

Run: crosslmm train configs/tables/table5_frozen.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """`stage2_instruct.py`, where the encoder keeps its weights."""
    base = load_experiment(Path(__file__).parent.with_name("stage2_instruct.py"))
    # Features are kept for the backward pass instead of computed twice.
    vision = dataclasses.replace(base.model.vision, keep_features=True)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, vision=vision),
        stage=dataclasses.replace(base.stage, frozen=("encoder",)),
        run=dataclasses.replace(base.run, out="runs/table5_frozen"),
    )
