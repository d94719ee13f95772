"""Stage 1 of CrossLMM with Qwen2.5-0.5B on your own clips, on one GPU: projector and V2V learn.

Between the `tiny` configs and the paper's 2B. `small_own_data_stage2.py` follows on the same clips. By its
weights, gradients and moments it should fit 24 GB; raise `microbatches` when memory runs out.

Run: crosslmm convert from-hf --vision siglip2-so400m-patch14-384 --llm Qwen2.5-0.5B-Instruct \
         --preset crosslmm_0.5b --out models/crosslmm_0.5b
then: crosslmm data index configs/small_own_data_mixture.yaml --out data/own/index \
         --tokenizer models/crosslmm_0.5b
then: crosslmm train configs/small_own_data.py
"""

import dataclasses

from crosslmm_jax.config import DataConfig, ExperimentConfig, RunConfig, SamplingConfig, StageConfig
from crosslmm_jax.presets import crosslmm_0_5b


def get_config() -> ExperimentConfig:
    """One epoch of about 16,000 clips; set `steps` to your rows over `batch_size`."""
    model = crosslmm_0_5b()
    # The encoder is frozen, so its features are kept instead of encoding each frame twice.
    vision = dataclasses.replace(model.vision, keep_features=True)
    return ExperimentConfig(
        model=dataclasses.replace(model, vision=vision),
        data=DataConfig(
            index="data/own/index",
            tokenizer="models/crosslmm_0.5b",
            batch_size=32,  # fewer rows than the paper's 512 (table 3), and fewer shapes to compile
            max_shapes=4,  # each shape is compiled once
            max_text_tokens=512,  # questions and answers about a clip are short
            sampling=SamplingConfig(policy="uniform", frames=32),  # table 3: up to 32 frames
            num_workers=4,  # decoding keeps up with one GPU
        ),
        stage=StageConfig(
            name="stage1",
            trainable=("projector", "v2v"),  # sec. 4.1
            directions=("v2v",),  # table 2c: T2V joins in stage 2
            steps=500,
            learning_rate=1e-4,  # sec. 4.1
            # Gates start at 0, and Adam moves a scalar by about one learning rate per step. At the rate of
            # the matrices they would stay shut in a run this short.
            gate_lr_scale=50.0,
            warmup_ratio=0.03,  # not in the paper: LLaVA's
            microbatches=16,  # two rows at once
        ),
        run=RunConfig(out="runs/small_own_data", init_from="models/crosslmm_0.5b", save_every=100),
    )
