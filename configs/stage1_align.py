"""Stage 1 of CrossLMM-2B as the paper trains it: alignment of vision and language on captions.

Run: crosslmm data index configs/stage1_mixture.yaml --out data/stage1/index --tokenizer models/crosslmm_2b
then: crosslmm train configs/stage1_align.py
"""

import dataclasses

from crosslmm_jax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModalityWeights,
    RunConfig,
    SamplingConfig,
    StageConfig,
)
from crosslmm_jax.presets import crosslmm_2b


def get_config() -> ExperimentConfig:
    """Projector and V2V learn; encoder and language model stay as they were pretrained."""
    model = crosslmm_2b()  # sec. 4.1: SigLIP2, Qwen2.5-1.5B-Instruct, every K=4 layers (table 2b)
    # The encoder is frozen, so its features are kept for the backward pass instead of computed twice.
    vision = dataclasses.replace(model.vision, keep_features=True)
    return ExperimentConfig(
        model=dataclasses.replace(model, vision=vision),
        data=DataConfig(
            index="data/stage1/index",  # 15M CapsFusion, 5M InternVid
            tokenizer="models/crosslmm_2b",
            batch_size=512,  # table 3
            max_text_tokens=256,
            max_shapes=8,
            modality_weights=ModalityWeights(image=1.0, video=1.0),  # appendix: 1:1
            sampling=SamplingConfig(policy="uniform", frames=32),  # table 3: images and up to 32 frames
            num_workers=8,
        ),
        stage=StageConfig(
            name="stage1",
            trainable=("projector", "v2v"),  # sec. 4.1; table 2c is best with T2V left out here
            directions=("v2v",),
            steps=39_062,  # table 3: one epoch of 20M samples
            learning_rate=1e-4,  # sec. 4.1 (table 3 says 1e-3)
            warmup_ratio=0.03,  # not in the paper: LLaVA's
            microbatches=None,  # as few as fit the memory
        ),
        run=RunConfig(out="runs/stage1_align", init_from="models/crosslmm_2b"),
        # data over nodes, fsdp inside; where devices outnumber rows, the rest to frames and heads
        mesh=MeshConfig(data=-1, fsdp=-1, context=-1, tensor=-1),
    )
