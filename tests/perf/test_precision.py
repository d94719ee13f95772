"""The table of what 8 bits cost: its measures by hand, its outliers, and its rows on a real file."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.errors import UserError
from crosslmm_jax.profiling import Record
from crosslmm_jax.profiling.inputs import random_params
from perf import precision
from perf.clips import read_clips
from perf.precision import PrecisionRequest


def wide_enough() -> ModelConfig:
    """The tiny model with widths of which outliers take more than the first channel."""
    config = presets.tiny()
    vision = dataclasses.replace(config.vision, width=400, mlp_width=400)
    return dataclasses.replace(config, vision=vision)


def test_measures_by_hand() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)
    got = np.array([[4.0, 3.0], [0.0, 1.0]], np.float32)
    found = precision.differences(got, expected)
    assert found == pytest.approx(
        {
            "cosine_mean": (24 / 25 + 1) / 2, "cosine_min": 24 / 25, "error_mean": 3 / 4, "error_max": 1,
            "rms": np.sqrt(29 / 4),
        }
    )  # fmt: skip
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    rows = np.log(np.stack([p, q])), np.log(np.stack([q, q]))
    found = precision.choices(rows[1] + 7, rows[0])  # logits: up to a constant
    kl = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert found == pytest.approx({"kl_mean": kl / 2, "kl_max": kl, "top1": 0.5})


@pytest.mark.slow
def test_outliers_stand_out_and_leave_the_function() -> None:
    config = wide_enough()
    params = random_params(config, stacked=True)
    changed = precision.with_outliers(params)
    layers, before = changed["encoder"]["layers"], params["encoder"]["layers"]
    large = np.asarray(layers["norm2_scale"][0]) / np.asarray(before["norm2_scale"][0])
    assert sorted(np.flatnonzero(large != 1)) == [0, 200] and set(large) == {1, 20}
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    clip, same = (precision.encode(config, p, frames) for p in (params, changed))
    found = precision.differences(*(np.asarray(x.features).reshape(-1, 400) for x in (same, clip)))
    assert found["cosine_min"] > 0.999, "but for GELU"
    request = PrecisionRequest(task="perf.precision", system="", frames=(2,), text=20, videos="")
    a, b = (precision.logits(config, request, p, clip.visual) for p in (params, changed))
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.shape == (4, 512), "text after the video"


@pytest.mark.slow
def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real files: errors grow from bfloat16 to int8 to fp8, and the cache's are the smallest."""
    made = write_dataset(tmp_path / "data", num_train=4, num_heldout=4, seed=0)
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(2):
        shutil.copy(made.heldout_videos[number], folder / f"{number}.mp4")
    config = dataclasses.replace(wide_enough(), compute_dtype="bfloat16")
    monkeypatch.setattr(precision, "preset_with_tokens", lambda *_: config)
    request = PrecisionRequest(task="perf.precision", system="tiny", frames=(2,), text=24, videos=str(folder))
    record = Record(str(tmp_path / "r.json"), request)
    precision.run(record)
    assert len(record.rows) == 2 * (4 + 3 * 2 + 7)
    assert {row["clips"] for row in record.rows} == {2}

    def error(what: str, products: str, cache: str | None = None) -> float:
        (row,) = (
            row
            for row in record.rows
            if (row["what"], row["products"], row.get("cache")) == (what, products, cache)
            and row["weights"] == "random"
        )
        return row["error_mean"] / row["rms"]

    for what in ("features", "tokens"):
        assert 0 < error(what, "bfloat16") < error(what, "int8") < error(what, "fp8") < 0.2
    cached = [error("logits", "bfloat16", cache) for cache in ("bfloat16", "int8", "fp8")]
    assert 0 < cached[0] < error("logits", "int8", "bfloat16") < error("logits", "fp8", "bfloat16")
    assert cached[2] < error("logits", "fp8", "bfloat16")
    products = {
        (row["weights"], row["products"], row["scales"]): row["error_mean"] / row["rms"]
        for row in record.rows
        if row["what"] == "product"
    }
    fine, coarse = (("outliers", "int8", scales) for scales in ("by row and channel", "one for all"))
    assert products[fine] < products[coarse]


def test_a_folder_without_videos_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="--videos .*: name a folder that holds videos"):
            read_clips(folder, frames=2, size=32)
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UserError, match="a.mp4"):
        read_clips(tmp_path, frames=2, size=32)
