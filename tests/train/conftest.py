"""A model that compiles quickly, and stages for it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import (
    PARTS,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
)
from crosslmm_jax.parallel import make_mesh
from crosslmm_jax.train import loop


@pytest.fixture(scope="session")
def micro_config() -> ModelConfig:
    """Two layers of width 16; cross-attention in the first."""
    tiny = presets.tiny()
    return dataclasses.replace(
        tiny,
        vision=dataclasses.replace(
            tiny.vision, image_size=16, width=16, num_layers=2, num_heads=2, mlp_width=16
        ),
        decoder=dataclasses.replace(
            tiny.decoder, vocab_size=32, width=16, num_layers=2, head_dim=4, mlp_width=32
        ),
        attention="reference",
    )


@pytest.fixture(scope="session")
def make_stage() -> Callable[..., StageConfig]:
    """`make_stage(**fields)`: by default all parts are trained, with a learning rate for each group."""

    def stage(**changes) -> StageConfig:
        fields = {
            "name": "test", "trainable": PARTS, "directions": ("v2v", "t2v"), "steps": 10,
            "learning_rate": 1e-2, "vision_lr_scale": 0.2, "cross_attn_lr_scale": 2.0, "gate_lr_scale": 3.0,
            "warmup_ratio": 0.2, "weight_decay": 0.1,
        }  # fmt: skip
        return StageConfig(**(fields | changes))

    return stage


@pytest.fixture(scope="session")
def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def train_one_step(make_stage) -> Callable[[ModelConfig, DataConfig, Path], None]:
    """`train_one_step(model, data, out)`: one step, checked to have targets and no faults."""

    def train(model: ModelConfig, data: DataConfig, out: Path) -> None:
        result = loop.train(
            ExperimentConfig(
                model=model, data=data, stage=make_stage(steps=1, warmup_ratio=0.0),
                run=RunConfig(out=str(out), log_every=1, tensorboard=False),
            ),
            quiet=True,
        )  # fmt: skip
        (line,) = result.metrics
        assert np.isfinite(line["loss"]) and line["targets"] > 0 and line["faults"] == {}

    return train
