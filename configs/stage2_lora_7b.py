"""Stage 2 of CrossLMM-7B with LoRA on decoder and cross-attention: its state takes 23 GB instead of 135.

Starts from the MODEL folder of stage 1, and writes a plain one: the adapters are merged into the weights.

Run: crosslmm train configs/stage2_lora_7b.py
"""

import dataclasses
from pathlib import Path

from crosslmm_jax.config import ExperimentConfig, LoraConfig
from crosslmm_jax.config_io import load_experiment


def get_config() -> ExperimentConfig:
    """Not in the paper. Data, frames and batch size are those of `stage2_instruct_7b.py`."""
    base = load_experiment(Path(__file__).with_name("stage2_instruct_7b.py"))
    # The encoder is frozen, so its features are kept for the backward pass instead of computed twice.
    vision = dataclasses.replace(base.model.vision, keep_features=True)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, vision=vision),
        stage=dataclasses.replace(
            base.stage,
            name="stage2_lora",
            trainable=("projector", "*.gate"),  # T2V's gates start at 0: without them it would stay shut
            # LLaVA's recipe (scripts/v1_5/finetune_lora.sh): rank, alpha, 2e-4 for adapters, 2e-5 for the
            # projector.
            lora=LoraConfig(rank=128, alpha=256.0, lr_scale=10.0),
            learning_rate=2e-5,
            gate_lr_scale=25.0,  # 5e-4, as in the full stage 2
            frozen_dtype="bfloat16",
        ),
        run=dataclasses.replace(base.run, out="runs/stage2_lora_7b"),
    )
