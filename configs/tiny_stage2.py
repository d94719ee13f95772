"""Stage 2 of the `tiny` model on the videos of `crosslmm demo`: every part learns from questions and answers.

The demo's recipe as a config file, to read and to change. A minute or two on two CPU cores.

Run: crosslmm train configs/tiny_stage1.py, then: crosslmm train configs/tiny_stage2.py
"""

from crosslmm_jax.config import PARTS, DataConfig, ExperimentConfig, RunConfig, SamplingConfig, StageConfig
from crosslmm_jax.presets import tiny


def get_config() -> ExperimentConfig:
    """Starts from the MODEL folder of stage 1."""
    return ExperimentConfig(
        model=tiny(),
        data=DataConfig(
            index="runs/demo/index/dialogues",
            tokenizer="runs/demo/tokenizer",
            batch_size=16,  # rows of four questions about one video (paper: 128, table 3)
            sampling=SamplingConfig(policy="uniform", frames=4),  # one per scene (paper: 64 to 512, table 3)
            text_buckets=(88,),  # one batch shape: every dialogue fits
            frame_buckets=(4,),
            frame_cache_mb=256,  # holds all frames: each video is decoded once
        ),
        stage=StageConfig(
            name="stage2",
            trainable=PARTS,  # table 3: the full model
            directions=("v2v", "t2v"),  # table 2a and 2c
            steps=520,
            learning_rate=2e-3,  # ours, as in stage 1 (sec. 4.1: 1e-5)
            b2=0.98,
            vision_lr_scale=0.01,  # ours: a random encoder diverges at the full rate (sec. 4.1: 0.2)
        ),
        run=RunConfig(out="runs/tiny_stage2", init_from="runs/tiny_stage1/model", save_every=100),
    )
