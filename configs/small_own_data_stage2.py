"""Stage 2 of `small_own_data.py`, on the same clips: every part but the encoder learns.

Run: crosslmm train configs/small_own_data.py, then: crosslmm train configs/small_own_data_stage2.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """More frames, longer, and from the MODEL folder of stage 1."""
    first = load_experiment(Path(__file__).with_name("small_own_data.py"))
    # Ours: 64 frames, the fewest of the paper's 64 to 512 (table 3), at one row per microbatch.
    sampling = dataclasses.replace(first.data.sampling, frames=64)
    return dataclasses.replace(
        first,
        data=dataclasses.replace(first.data, sampling=sampling),
        stage=dataclasses.replace(
            first.stage,
            name="stage2",
            # Table 5: a frozen encoder loses a little. It saves its gradients and moments, 5 GB.
            trainable=("projector", "v2v", "t2v", "decoder"),
            directions=("v2v", "t2v"),  # table 2a and 2c
            steps=1000,  # two epochs: own data are few
            learning_rate=1e-5,  # sec. 4.1
            gate_lr_scale=250.0,  # T2V's gates start at 0, and have 1000 steps to open
            microbatches=32,  # one row at once
        ),
        run=dataclasses.replace(
            first.run, out="runs/small_own_data_stage2", init_from="runs/small_own_data/model"
        ),
    )
