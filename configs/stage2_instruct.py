"""Stage 2 of CrossLMM-2B as the paper trains it: instruction tuning of the full model on long video.

Run: crosslmm data index configs/stage2_mixture.yaml --out data/stage2/index --tokenizer models/crosslmm_2b
then: crosslmm train configs/stage2_instruct.py
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
            index="data/stage2/index",  # table 3: about 3M samples
            tokenizer="models/crosslmm_2b",
            batch_size=128,  # table 3
            max_shapes=24,  # its texts and videos spread widely: docs/results/padding.md
            # table 3: 64 to 512 frames; the rule is VideoChat-Flash's, whose third stage has the same data:
            # one per second, counts in multiples of 4, from the middles of equal intervals
            sampling=SamplingConfig(policy="dynamic_fps1", min_frames=64, max_frames=512, multiple=4),
            time_instruction="short",  # not in the paper: VideoChat-Flash's
            num_workers=8,
        ),
        stage=StageConfig(
            name="stage2",
            trainable=PARTS,  # table 3: full model; table 5: a trained encoder beats a frozen one
            directions=("v2v", "t2v"),  # table 2a and 2c
            steps=23_437,  # table 3: one epoch of about 3M samples
            learning_rate=1e-5,  # sec. 4.1
            vision_lr_scale=0.2,  # sec. 4.1: 2e-6 for the encoder
            # Ours. Adam moves a scalar by about one learning rate per step, and those of the stage sum to
            # 0.12: T2V's gates, which start at 0, would end below tanh(0.12).
            gate_lr_scale=50.0,
            warmup_ratio=0.03,  # not in the paper: LLaVA's
            microbatches=None,  # as few as fit the memory
        ),
        run=RunConfig(out="runs/stage2_instruct", init_from="runs/stage1_align/model"),
        # data over nodes, fsdp inside; where devices outnumber rows, the rest to frames and heads
        mesh=MeshConfig(data=-1, fsdp=-1, context=-1, tensor=-1),
    )
