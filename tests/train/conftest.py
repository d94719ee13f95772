"""A model that compiles quickly, and stages for it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from crosslmm_jax.config import (
    PARTS,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
)
from crosslmm_jax.config_io import to_dict
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.parallel import make_mesh
from crosslmm_jax.train import loop

CONFIG_FILE = """
import json
from pathlib import Path
from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.config_io import from_dict

def get_config():
    path = Path(__file__).with_suffix(".json")
    return from_dict(ExperimentConfig, json.loads(path.read_text()), source=path)
"""


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


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Videos, an index of their rows, and a tokenizer."""
    folder = tmp_path_factory.mktemp("files")
    write_dataset(folder / "data", num_train=4, num_heldout=4, seed=0)
    write_default_tokenizer(folder / "tokenizer")
    rows, tokenizer = str(folder / "data" / "train.json"), str(folder / "tokenizer")
    build_index(rows, folder / "index", tokenizer=tokenizer, quiet=True)
    return folder


@pytest.fixture(scope="session")
def experiment(files, micro_config, make_stage):
    """`experiment(out, stage={...}, **fields)`: a run; `fields` are those of its `RunConfig`."""

    def make(out: Path, *, stage: dict | None = None, **run) -> ExperimentConfig:
        decoder = dataclasses.replace(micro_config.decoder, vocab_size=512)
        return ExperimentConfig(
            model=dataclasses.replace(micro_config, decoder=decoder),
            data=DataConfig(
                index=str(files / "index"), tokenizer=str(files / "tokenizer"), batch_size=8,
                text_buckets=(96,), frame_buckets=(4,),
                sampling=SamplingConfig(frames=4), frame_cache_mb=16,
            ),
            stage=make_stage(**({"steps": 6} | (stage or {}))),
            run=RunConfig(**({"out": str(out), "log_every": 2, "save_every": 2, "tensorboard": False} | run)),
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def config_file(tmp_path_factory) -> Callable[[ExperimentConfig], str]:
    """`config_file(config)`: the path of a config file for the command line."""

    def write(config: ExperimentConfig) -> str:
        path = tmp_path_factory.mktemp("configs") / "config.py"
        path.write_text(CONFIG_FILE)
        path.with_suffix(".json").write_text(json.dumps(to_dict(config)))
        return str(path)

    return write


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
