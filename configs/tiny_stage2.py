"""Stage 2 of the `tiny` preset, on the videos that `crosslmm demo` wrote.

Run: crosslmm train configs/tiny_stage1.py, then: crosslmm train configs/tiny_stage2.py
"""

from crosslmm_jax.config import PARTS, DataConfig, ExperimentConfig, RunConfig, SamplingConfig, StageConfig
from crosslmm_jax.presets import tiny


def get_config() -> ExperimentConfig:
    """Everything learns on questions and answers; minutes on two CPU cores."""
    return ExperimentConfig(
        model=tiny(),
        data=DataConfig(
            annotations=("runs/demo/data/train.json",),
            media_root="runs/demo/data",
            tokenizer="runs/demo/tokenizer",
            batch_size=16,
            text_buckets=(96,),
            sampling=SamplingConfig(policy="uniform", frames=8),
            frame_cache_mb=256,
        ),
        stage=StageConfig(
            name="stage2",
            trainable=PARTS,  # sec. 4.1: the full model
            directions=("v2v", "t2v"),
            steps=200,
            learning_rate=3e-3,  # ours, as in stage 1
            vision_lr_scale=0.01,  # ours: a random encoder diverges at the full rate
        ),
        run=RunConfig(out="runs/tiny_stage2", init_from="runs/tiny_stage1/model", save_every=50),
    )
