"""Pictures and text of a source: image processor settings, and the real vocabulary."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image

from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.source.config import _unpadded
from crosslmm_jax.convert.source.processor import image_settings, tokenizer_size, with_tokenizer_json
from crosslmm_jax.data.media.image import resize
from crosslmm_jax.data.text.tokenizer import load_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.generate import RowSettings, Sampling, start
from crosslmm_jax.model import KVCache
from crosslmm_jax.model_folder import load_model_config, load_processor

QWEN = Path(__file__).parents[3] / "shared" / "tokenizer" / "qwen2.5"
needs_qwen = pytest.mark.skipif(not QWEN.is_dir(), reason="the real vocabulary is not here")


def settings_file(**changes) -> dict:
    size = {"height": 28, "width": 28}
    return {
        "size": size,
        "resample": 2,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    } | changes


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_settings_reach_the_model(sources, tmp_path, name) -> None:
    folder = shutil.copytree(sources.vision, tmp_path / "vision")
    settings = settings_file()
    if name == "processor_config.json":
        settings = {"image_processor": settings, "processor_class": "X"}
    (folder / name).write_text(json.dumps(settings))
    request = Request(vision=str(folder), llm=str(sources.tied))
    convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    vision, processor = load_model_config(tmp_path / "model").vision, load_processor(tmp_path / "model")
    assert vision.image_mean == processor.image_mean == (0.4, 0.5, 0.6)
    assert vision.image_std == processor.image_std == (0.2, 0.3, 0.4)
    assert processor.resampling == "bilinear"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"size": {"height": 224, "width": 224}}, "field size is"),
        ({"resample": 0}, "field resample is 0"),
        ({"image_std": [0, 1, 1]}, "field image_std"),
        ({"image_mean": 0.5}, "field image_mean"),
        ({"do_normalize": False}, "field do_normalize is False"),
        ({"rescale_factor": 1.0}, "field rescale_factor is 1.0"),
        ({"do_center_crop": True}, "field do_center_crop is True; it must be false"),
        ({"size": 384}, "field size is"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, match) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings_file(**changes)))
    with pytest.raises(UserError, match=match):
        image_settings(tmp_path, 28)


def test_the_older_way_to_say_a_size(tmp_path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(settings_file(size=28, do_center_crop=False))
    )
    assert image_settings(tmp_path, 28).resampling == "bilinear"


@pytest.mark.parametrize("resampling", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(97, 61), (40, 200), (384, 384), (20, 31)])
def test_pixels_equal_those_of_the_siglip_processor(tmp_path, resampling, shape) -> None:
    """Smooth colours with noise, larger and smaller than the target; one grey level of 255 apart at most."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, shape[0] * shape[1] * 3).reshape(*shape, 3)
    picture = Image.fromarray((ramp + rng.integers(0, 55, (*shape, 3))).astype(np.uint8))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            settings_file(resample=3 if resampling == "bicubic" else 2, size={"height": 64, "width": 64})
        )
    )
    settings = image_settings(tmp_path, 64)
    assert settings.resampling == resampling
    processor = transformers.SiglipImageProcessor.from_pretrained(tmp_path)
    expected = np.asarray(processor(images=picture, return_tensors="np")["pixel_values"])[0].transpose(
        1, 2, 0
    )
    ours = (resize(picture, 64, settings.resampling) / 255 - np.array(settings.mean)) / np.array(settings.std)
    grey = 1 / 255 / np.array(settings.std)
    assert np.all(np.abs(ours - expected) <= grey * 1.001)


@pytest.mark.slow
@needs_qwen
def test_the_real_vocabulary(tmp_path) -> None:
    assert tokenizer_size(QWEN) == 151665
    tokenizer = load_tokenizer(QWEN)
    assert tokenizer.encode_plain("Hello world!") == [9707, 1879, 0]
    assert (tokenizer.im_end, tokenizer.video_pad, tokenizer.vocab_size) == (151645, 151656, 151665)


@pytest.mark.slow
@needs_qwen
def test_a_tokenizer_of_vocabulary_and_merges(sources, tmp_path) -> None:
    """The older form, without tokenizer.json, gives the same ids."""
    described = json.loads((QWEN / "tokenizer.json").read_text(encoding="utf-8"))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"])
    older = tmp_path / "older"
    older.mkdir()
    (older / "vocab.json").write_text(json.dumps(described["model"]["vocab"]), encoding="utf-8")
    (older / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    # As Qwen2.5's own repositories say it.
    added = {str(token.pop("id")): token for token in described["added_tokens"]}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (older / "tokenizer_config.json").write_text(json.dumps(config))
    with with_tokenizer_json(older) as folder:
        assert tokenizer_size(folder) == 151665
        tokenizer, expected = load_tokenizer(folder), load_tokenizer(QWEN)
    for text in ("Hello world!", "What's 1234 + 5?\n\nÜber 北京", "<|im_end|> stays text"):
        assert tokenizer.encode_plain(text) == expected.encode_plain(text)
    assert tokenizer.im_end == expected.im_end


def test_half_a_tokenizer(tmp_path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text("{ no json")
    with pytest.raises(UserError, match="cannot be read"), with_tokenizer_json(tmp_path):
        pass


@needs_qwen
def test_a_vocabulary_larger_than_the_embedding(sources, tmp_path) -> None:
    request = Request(vision=str(sources.vision), llm=str(sources.tied))
    with pytest.raises(UserError, match="the tokenizer has 151665 tokens, the embedding only 512 rows"):
        convert_from_hf(request, tmp_path / "model", tokenizer=QWEN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("rows", [151936, 152064])
@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_rows_beyond_the_tokenizer_are_never_sampled(rows, temperature) -> None:
    logits = jnp.zeros((4, rows)).at[:, 151665:].set(50.0)
    settings = RowSettings.joined([RowSettings.of(Sampling(temperature), seed=row) for row in range(4)])
    cache = KVCache((), (), jnp.zeros(4, jnp.int32), jnp.zeros(4, jnp.int32), None)
    drawn = start(logits, cache, settings, jnp.zeros(4, jnp.int32), vocab_size=151665).token
    assert int(drawn.max()) < 151665


def test_a_tokenizer_without_the_tokens_of_prompts(sources, tmp_path) -> None:
    shutil.copytree(sources.tokenizer, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|video_pad|>", "<|other|>"))
    with pytest.raises(UserError, match=r"has no <\|video_pad\|>; give that of a Qwen2.5"):
        tokenizer_size(tmp_path / "tokenizer")
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer_size(tmp_path / "tokenizer")


def test_rows_that_hugging_face_added_to_released_models() -> None:
    assert [_unpadded(rows) for rows in (152128, 152000, 152064, 151936, 576)] == [
        152064, 151936, 152064, 151936, 576,
    ]  # fmt: skip
