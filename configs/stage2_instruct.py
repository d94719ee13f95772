"""Stage 2 of CrossLMM-2B as the paper trains it: instruction tuning of the full model on long video.

Run: crosslmm train configs/stage2_instruct.py --data.annotations instructions.json
"""

from crosslmm_jax.config import (
    PARTS,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
)
from crosslmm_jax.presets import crosslmm_2b


def get_config() -> ExperimentConfig:
    """Every part learns, the encoder five times more slowly."""
    return ExperimentConfig(
        model=crosslmm_2b(),
        data=DataConfig(
            annotations=("data/stage2/instructions.json",),  # table 3: about 3M samples
            media_root="data/stage2",
            tokenizer="models/crosslmm_2b",
            batch_size=128,  # table 3
            text_buckets=(256, 512, 1024, 2048),
            frame_buckets=(1, 64, 128, 256, 512),  # table 3: 64 to 512 frames, and images
            sampling=SamplingConfig(policy="fps", fps=1.0, frames=512),
            num_workers=8,
        ),
        stage=StageConfig(
            name="stage2",
            trainable=PARTS,  # table 3: full model; table 5: a trained encoder beats a frozen one
            directions=("v2v", "t2v"),  # table 2a and 2c
            steps=23_437,  # table 3: one epoch of about 3M samples
            learning_rate=1e-5,  # sec. 4.1
            vision_lr_scale=0.2,  # sec. 4.1: 2e-6 for the encoder
            warmup_ratio=0.03,  # not in the paper: LLaVA's
            microbatches=16,
        ),
        run=RunConfig(out="runs/stage2_instruct", init_from="runs/stage1_align/model"),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
