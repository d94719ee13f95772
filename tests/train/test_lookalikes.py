"""Look-alike rows in the formats of the real data sets, indexed from one mixture, batched and trained on."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.demo.tokenizer import write_default_tokenizer

WRITER = Path(__file__).resolve().parents[1] / "data" / "lookalikes.py"
DATASETS = {
    "llava", "llava#2", "frames", "gifs", "videochat2", "moviechat", "vript", "internvid", "internvid_cut",
    "moviechat_list", "vript_list", "sharegpt4video", "video_chatgpt", "capsfusion", "shards", "pictures",
    "clips", "onevision",
}  # fmt: skip
SPOILT = {
    "clip_times", "conversation", "malformed", "missing", "not_downloaded", "outside_root", "placeholders",
}  # fmt: skip


@pytest.mark.slow
def test_look_alikes_of_every_format_train(tmp_path: Path, train_one_step) -> None:
    mixture = runpy.run_path(str(WRITER))["write_lookalikes"](tmp_path / "files")
    write_default_tokenizer(tmp_path / "tokenizer")
    index, tokenizer = tmp_path / "index", str(tmp_path / "tokenizer")
    build_index(str(mixture), index, tokenizer=tokenizer, quiet=True)
    bad = [json.loads(line) for line in (index / "bad.jsonl").read_text().splitlines()]
    assert {line["reason"] for line in bad} == SPOILT
    data = DataConfig(
        index=str(index), tokenizer=tokenizer, batch_size=8, sampling=SamplingConfig(frames=4), max_shapes=4
    )
    model = dataclasses.replace(presets.tiny(), attention="reference")  # compiles in half the time
    dataset = Dataset(data, tokens_per_frame=model.merge.tokens_per_frame, image_size=model.vision.image_size)
    rows = [dataset.rows[number] for number in range(len(dataset.rows))]
    assert {row.dataset for row in rows} == DATASETS and dataset.num_without_bucket == 0
    for number, row in enumerate(rows):
        batch = dataset.batch([number])
        count = batch.visible_frames.counts.max()  # frames that are not padding
        assert batch.loss_mask.any() and (count > 0) == bool(row.media), row.where
        assert (batch.frames[0, :count].std(axis=(1, 2, 3)) > 1).all(), row.where
    train_one_step(model, data, tmp_path / "run")
