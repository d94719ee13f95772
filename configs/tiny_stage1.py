"""Stage 1 of the `tiny` model on the videos of `crosslmm demo`: projector and V2V learn from captions.

The demo's recipe as a config file, to read and to change. Seconds on two CPU cores.

Run: crosslmm demo, then: crosslmm train configs/tiny_stage1.py
"""

from crosslmm_jax.config import DataConfig, ExperimentConfig, RunConfig, SamplingConfig, StageConfig
from crosslmm_jax.presets import tiny


def get_config() -> ExperimentConfig:
    """Encoder and decoder keep their random weights."""
    return ExperimentConfig(
        model=tiny(),
        data=DataConfig(
            index="runs/demo/index/captions",
            tokenizer="runs/demo/tokenizer",
            batch_size=16,  # captions per step (paper: 512, table 3)
            sampling=SamplingConfig(policy="uniform", frames=4),  # one per scene (paper: up to 32, table 3)
            text_buckets=(48,),  # one batch shape: every caption fits
            frame_buckets=(4,),
            frame_cache_mb=256,  # holds all frames: each video is decoded once
        ),
        stage=StageConfig(
            name="stage1",
            trainable=("projector", "v2v"),  # sec. 4.1
            directions=("v2v",),  # table 2c: T2V joins in stage 2
            steps=40,
            learning_rate=2e-3,  # ours: a model 10,000 times smaller learns at a higher rate (sec. 4.1: 1e-4)
            b2=0.98,  # ours: a short run forgets its first gradients sooner
        ),
        run=RunConfig(out="runs/tiny_stage1", save_every=100),
    )
