"""Stage 1 of the `tiny` preset, on the videos that `crosslmm demo` wrote: a start for your own.

Run: crosslmm demo --quick, then: crosslmm train configs/tiny_stage1.py
"""

from crosslmm_jax.config import DataConfig, ExperimentConfig, RunConfig, SamplingConfig, StageConfig
from crosslmm_jax.presets import tiny


def get_config() -> ExperimentConfig:
    """Projector and V2V learn on captions; a minute on two CPU cores."""
    return ExperimentConfig(
        model=tiny(),
        data=DataConfig(
            annotations=("runs/demo/data/captions.json",),
            media_root="runs/demo/data",
            tokenizer="runs/demo/tokenizer",
            batch_size=16,
            text_buckets=(96,),
            sampling=SamplingConfig(policy="uniform", frames=8),
            frame_cache_mb=256,
        ),
        stage=StageConfig(
            name="stage1",
            trainable=("projector", "v2v"),  # sec. 4.1 and table 2c: T2V joins in stage 2
            directions=("v2v",),
            steps=60,
            learning_rate=3e-3,  # ours: three orders of magnitude fewer weights than the paper's
        ),
        run=RunConfig(out="runs/tiny_stage1", save_every=20),
    )
