"""Text, pictures, several pictures and videos in one run: a program for each shape, one kind per step."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from crosslmm_jax.config import DataConfig, ExperimentConfig, ModalityWeights, RunConfig, SamplingConfig
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.model_folder import load_processor
from crosslmm_jax.train import loop


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight rows of each kind."""
    from PIL import Image

    written = write_dataset(tmp_path / "set", num_train=8, num_heldout=4, seed=0)
    write_default_tokenizer(tmp_path / "tokenizer")
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{number}.png")
    rows = json.loads(written.captions.read_text())
    answer = {"from": "gpt", "value": "An answer."}
    for number in range(8):
        rows.append({"conversations": [{"from": "human", "value": "Hello?"}, answer]})
        picture = f"{number}.png"
        rows.append(
            {"image": picture, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, answer]}
        )
        turn = {"from": "human", "value": "<image> or <image>?"}
        rows.append({"image": [picture, "0.png"], "conversations": [turn, answer]})
    (tmp_path / "set" / "rows.json").write_text(json.dumps(rows))
    index, tokenizer = tmp_path / "index", str(tmp_path / "tokenizer")
    build_index(str(tmp_path / "set" / "rows.json"), index, tokenizer=tokenizer, quiet=True)
    return tmp_path


@pytest.mark.slow
def test_every_kind_trains(folder: Path, micro_config, make_stage) -> None:
    decoder = dataclasses.replace(micro_config.decoder, vocab_size=512)
    config = ExperimentConfig(
        model=dataclasses.replace(micro_config, decoder=decoder),
        data=DataConfig(
            index=str(folder / "index"), tokenizer=str(folder / "tokenizer"), batch_size=8,
            sampling=SamplingConfig(frames=4), time_instruction="full",
            modality_weights=ModalityWeights(text=1, image=1, multi_image=1, video=1),
        ),
        stage=make_stage(steps=4, warmup_ratio=0.0),
        run=RunConfig(out=str(folder / "run"), log_every=1, tensorboard=False),
    )  # fmt: skip
    result = loop.train(config, quiet=True)
    assert [line["step"] for line in result.metrics] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) and line["targets"] > 0 for line in result.metrics)
    assert all(line["faults"] == {} for line in result.metrics)
    assert all(line["truncated"] == {"rows": 0, "turns": 0} for line in result.metrics)
    assert load_processor(result.model_folder).time_instruction == "full"
