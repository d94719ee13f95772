"""Pictures and text of a source: image processor settings, and the real vocabulary."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.convert.export_settings import generation_config
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.source.config import _unpadded
from crosslmm_jax.convert.source.processor import (
    end_tokens,
    image_settings,
    vocabulary_of,
    with_tokenizer_json,
)
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.data.media.image import resize
from crosslmm_jax.data.text.tokenizer import load_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.generate import RowSettings, Sampling, start
from crosslmm_jax.model import KVCache
from crosslmm_jax.model_folder import Processor, load_model_config, load_processor, read_json

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
    assert max(vocabulary_of(QWEN).values()) == 151664
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
        assert vocabulary_of(folder) == vocabulary_of(QWEN)
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
        vocabulary_of(tmp_path / "tokenizer")
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        vocabulary_of(tmp_path / "tokenizer")


def test_rows_that_hugging_face_added_to_released_models() -> None:
    assert [_unpadded(rows) for rows in (152128, 152000, 152064, 151936, 576)] == [
        152064, 151936, 152064, 151936, 576,
    ]  # fmt: skip


def id_of(folder: Path, token: str) -> int:
    return vocabulary_of(folder)[token]


def with_generation_config(sources, folder: Path, content: object) -> Path:
    shutil.copytree(sources.tied, folder)
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_all_tokens_that_the_source_ends_with_end_an_answer(sources, tmp_path) -> None:
    """A plain token, a special one and one that is not there; and they are written back."""
    plain, special = load_tokenizer(sources.tokenizer).encode_plain("!")[0], "<|image_pad|>"
    ends = [id_of(sources.tokenizer, special), 5_000, id_of(sources.tokenizer, "<|endoftext|>"), plain]
    folder = with_generation_config(sources, tmp_path / "llm", {"eos_token_id": ends})
    request = Request(vision=str(sources.vision), llm=str(folder))
    report = convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    expected = ("<|im_end|>", "<|endoftext|>", special, "!")
    assert load_processor(tmp_path / "model").end_tokens == expected
    notes = "\n".join(report.notes)
    assert "from generation_config.json: also <|image_pad|> and !" in notes
    assert "eos_token_id 5000 of generation_config.json is left out" in notes
    ids = tuple(id_of(sources.tokenizer, token) for token in expected)
    assert load_tokenizer(tmp_path / "model").ids_of(expected) == ids
    convert_to_hf(tmp_path / "model", tmp_path / "export")
    for part in ("llm", "crosslmm"):
        assert read_json(tmp_path / "export" / part / "generation_config.json")["eos_token_id"] == list(ids)
    back = Request(crosslmm=str(tmp_path / "export"))
    convert_from_hf(back, tmp_path / "back")
    assert load_processor(tmp_path / "back").end_tokens == expected
    path = tmp_path / "export" / "crosslmm" / "config.json"  # as an export from before there were end tokens
    described = read_json(path)
    del described["processor"]["end_tokens"]
    path.write_text(json.dumps(described))
    expected = expected[:2]
    convert_from_hf(back, tmp_path / "back")
    assert load_processor(tmp_path / "back").end_tokens == expected


@pytest.mark.parametrize("content", [None, {}, {"eos_token_id": None}, {"eos_token_id": []}, "<|endoftext|>"])
def test_a_source_that_names_no_further_end_token_keeps_both(sources, tmp_path, content) -> None:
    if isinstance(content, str):
        content = {"eos_token_id": id_of(sources.tokenizer, content)}
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert end_tokens(tmp_path, vocabulary_of(sources.tokenizer)) == (("<|im_end|>", "<|endoftext|>"), [])


@pytest.mark.parametrize("ids", ["2", True, [1, None], -1, 3.0])
def test_end_tokens_that_are_no_ids(sources, tmp_path, ids) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UserError, match="field eos_token_id is .* an id or a list of ids"):
        end_tokens(tmp_path, {"a": 1})


def test_an_end_token_that_the_tokenizer_lacks_is_not_exported(sources) -> None:
    processor = Processor(
        image_size=28, tokens_per_frame=1, sampling=SamplingConfig(), system_prompt="", end_tokens=("<no>",)
    )
    with pytest.raises(UserError, match="field end_tokens names <no>"):
        generation_config(processor, vocabulary_of(sources.tokenizer), source=sources.root)
