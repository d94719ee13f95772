"""The whole path from real clips to a step of the `tiny` preset."""

import dataclasses
import json
from pathlib import Path

import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.loader import BatchIterator
from crosslmm_jax.demo.tokenizer import write_default_tokenizer

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "videos"


@pytest.mark.slow
@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not here")
def test_real_clips_are_indexed_batched_and_trained_on(tmp_path: Path, train_one_step) -> None:
    names = sorted(path.name for path in CLIPS.glob("*.mp4"))
    turns = [
        {"from": "human", "value": "<image>\nWhat happens?"},
        {"from": "gpt", "value": "Somebody moves."},
    ]
    rows = [{"video": name, "conversations": turns} for name in names]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    index, tokenizer = tmp_path / "index", str(tmp_path / "tokenizer")
    write_default_tokenizer(tokenizer)
    report = build_index(
        str(tmp_path / "rows.json"), index, tokenizer=tokenizer, media_root=str(CLIPS), quiet=True
    )
    assert report.rows == len(names) and not report.bad
    data = DataConfig(
        index=str(index), tokenizer=tokenizer, batch_size=8, num_workers=1,
        sampling=SamplingConfig(policy="fps", fps=1.0, frames=16), time_instruction="full",
    )  # fmt: skip
    model = dataclasses.replace(presets.tiny(), attention="reference")  # compiles in half the time
    dataset = Dataset(data, tokens_per_frame=model.merge.tokens_per_frame, image_size=model.vision.image_size)
    iterator = BatchIterator(dataset)
    batch = next(iterator)
    iterator.close()
    assert set(batch.row_index.tolist()) == set(range(len(names))) and not iterator.faults
    assert batch.visible_frames.counts.max(axis=1).min() >= 3 and batch.frames.std() > 10
    assert not any(iterator.truncated.values())
    train_one_step(model, data, tmp_path / "run")
