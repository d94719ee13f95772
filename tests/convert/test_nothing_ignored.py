"""What a checkpoint says beside its sizes: it is kept, or the report names it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import transformers

from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.source.config import decoder_sizes
from crosslmm_jax.convert.source.files import SafetensorsSource
from crosslmm_jax.convert.source.processor import generation_of
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.convert.verify import verify
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import (
    Generation,
    load_model_config,
    load_processor,
    load_weights,
    read_json,
)

HEAD = "lm_head.weight"


def edited(source: Path, folder: Path, change, **fields) -> Path:
    """A copy of a checkpoint of one file with other tensors, and other fields of config.json."""
    shutil.copytree(source, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json") | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_head(offset: float):
    def change(tensors) -> None:
        tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()
        tensors[HEAD][3, 4] += offset

    return change


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_head_that_differs_from_the_embedding_is_kept(sources, tmp_path, offset) -> None:
    """As transformers does, although config.json says that they are tied."""
    llm = edited(sources.tied, tmp_path / "llm", with_head(offset))
    assert read_json(llm / "config.json")["tie_word_embeddings"] is True
    arguments = {"vision": str(sources.vision), "llm": str(llm)}
    report = convert_from_hf(Request(**arguments), tmp_path / "model", tokenizer=sources.tokenizer)
    config = load_model_config(tmp_path / "model")
    assert config.decoder.tie_embeddings == (offset == 0)
    noted = any("lm_head.weight differs from the embedding" in note for note in report.notes)
    assert noted == (offset != 0)
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(llm)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == config.decoder.tie_embeddings
    decoder = load_weights(tmp_path / "model", config, dtype="float32")["decoder"]
    head = decoder["embedding"].T if offset == 0 else decoder["lm_head"]
    np.testing.assert_array_equal(np.asarray(head).T, theirs.lm_head.weight.float().detach().numpy())
    if offset:
        assert verify(tmp_path / "model", **arguments).diverging is None


def test_a_tied_head_of_llava_is_compared_too(sources, tmp_path) -> None:
    source = sources.llava["hf_4_52"]
    text = read_json(source / "config.json")["text_config"] | {"tie_word_embeddings": True}
    fields = {"tie_word_embeddings": True, "text_config": text}
    llava = edited(source, tmp_path / "llava", lambda tensors: None, **fields)
    report = convert_from_hf(Request(llava=str(llava)), tmp_path / "model", tokenizer=sources.tokenizer)
    assert not load_model_config(tmp_path / "model").decoder.tie_embeddings
    assert any("both are kept" in note for note in report.notes)


@pytest.mark.slow
def test_verify_does_not_repeat_a_mistake_of_the_conversion(sources, tmp_path, monkeypatch) -> None:
    """Neither of reading a tensor, nor of its name."""
    read, name = SafetensorsSource.read, "model.layers.3.mlp.up_proj.weight"
    monkeypatch.setattr(
        SafetensorsSource, "read", lambda self, key: read(self, key) + (0.25 if key == name else 0)
    )
    swapped = {"model.layers.1.mlp.down_proj.weight": "model.layers.2.mlp.down_proj.weight"}
    swapped |= {new: old for old, new in swapped.items()}
    arguments = {"vision": str(sources.vision), "llm": str(sources.tied)}
    request = Request(**arguments, dtype="float32")
    convert_from_hf(request, tmp_path / "read", tokenizer=sources.tokenizer)
    result = verify(tmp_path / "read", **arguments)
    assert result.diverging is not None and result.diverging.block == "decoder layer 3"
    monkeypatch.setattr(SafetensorsSource, "read", read)
    from crosslmm_jax.convert.families import llava

    canonical = llava.canonical
    monkeypatch.setattr(llava, "canonical", lambda key: swapped.get(canonical(key), canonical(key)))
    convert_from_hf(request, tmp_path / "named", tokenizer=sources.tokenizer)
    result = verify(tmp_path / "named", **arguments)
    assert result.diverging is not None and result.diverging.block == "decoder layer 1"


def test_verify_reads_pixel_settings_of_its_own(sources, tmp_path) -> None:
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    folder = shutil.copytree(sources.vision, tmp_path / "vision")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    arguments = {"vision": str(folder), "llm": str(sources.tied)}
    convert_from_hf(Request(**arguments), tmp_path / "model", tokenizer=sources.tokenizer)
    assert verify(tmp_path / "model", **arguments).diverging is None


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_the_tower_that_a_llava_checkpoint_lacks(sources, tmp_path, layout) -> None:
    def without_tower(tensors) -> None:
        for name in [name for name in tensors if "vision_tower." in name]:
            del tensors[name]

    llava = edited(sources.llava[layout], tmp_path / "llava", without_tower)
    out = tmp_path / "model"
    with pytest.raises(UserError, match=r"add --vision with"):
        convert_from_hf(Request(llava=str(llava)), out, tokenizer=sources.tokenizer)
    arguments = {"llava": str(llava), "vision": str(sources.vision)}
    convert_from_hf(Request(**arguments), out, tokenizer=sources.tokenizer)
    config = load_model_config(out)
    encoder = load_weights(out, config)["encoder"]
    tower = safetensors.torch.load_file(sources.vision / "model.safetensors")
    np.testing.assert_array_equal(encoder["post_norm_scale"], tower["post_layernorm.weight"])
    assert config.vision.depth == 2 and verify(out, **arguments).diverging is None


def test_weights_that_are_not_needed_are_mentioned(sources, tmp_path) -> None:
    request = Request(llava=str(sources.llava["original"]), vision=str(sources.vision))
    report = convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    assert "--vision gives sizes and image settings only: --llava has a vision tower" in report.notes


def test_fields_of_a_config_that_are_not_used_are_listed(sources, tmp_path) -> None:
    fields = {
        "dual_chunk_attention_config": {"chunk_size": 9},
        "logit_scale": 2.0,
        "is_decoder": False,
    }
    llm = edited(sources.tied, tmp_path / "llm", lambda tensors: None, **fields)
    request = Request(vision=str(sources.two_tower), llm=str(llm))
    report = convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    (listed,) = (note for note in report.notes if "not used" in note)
    assert listed == (
        "fields of --llm's config.json that are not used: dual_chunk_attention_config, logit_scale"
    )


YARN = {"factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"rope_scaling": YARN | {"type": "yarn"}, "rope_theta": 5e4, "rope_parameters": None}, 1024),
        ({"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 5e4}}, 1024),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": None},
                "rope_theta": 5e4, "rope_parameters": None, "max_position_embeddings": 512,
            },
            1024,
        ),
        (
            {
                "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0},
                "max_position_embeddings": 768,
            },
            768,
        ),
    ],
)  # fmt: skip
def test_yarn_is_read_as_transformers_reads_it(sources, tmp_path, fields, positions) -> None:
    config = read_json(sources.tied / "config.json") | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    decoder = decoder_sizes(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    wanted = read["factor"], read["original_max_position_embeddings"], read["rope_theta"]
    assert (decoder.yarn_factor, decoder.yarn_trained_positions, decoder.rope_theta) == wanted
    assert decoder.max_positions == positions


def test_yarn_goes_in_and_out(sources, tmp_path) -> None:
    fields = {"rope_scaling": YARN | {"rope_type": "yarn"}, "rope_theta": 5e4, "rope_parameters": None}
    llm = edited(sources.tied, tmp_path / "llm", lambda tensors: None, **fields)
    arguments = {"vision": str(sources.vision), "llm": str(llm)}
    convert_from_hf(Request(**arguments), tmp_path / "model", tokenizer=sources.tokenizer)
    config = load_model_config(tmp_path / "model")
    assert (config.decoder.yarn_factor, config.decoder.max_positions) == (4.0, 1024)
    assert verify(tmp_path / "model", **arguments).diverging is None
    convert_to_hf(tmp_path / "model", tmp_path / "export")
    exported = transformers.AutoConfig.from_pretrained(tmp_path / "export" / "llm").rope_parameters
    assert exported == YARN | {"rope_type": "yarn", "rope_theta": 5e4}
    assert decoder_sizes(tmp_path / "export" / "llm") == config.decoder
    convert_from_hf(Request(crosslmm=str(tmp_path / "export")), tmp_path / "back")
    assert load_model_config(tmp_path / "back") == config


SAID = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


def test_sampling_of_the_source_goes_in_and_out(sources, tmp_path) -> None:
    llm = shutil.copytree(sources.tied, tmp_path / "llm")
    (llm / "generation_config.json").write_text(json.dumps(SAID | {"eos_token_id": None, "min_p": 0.1}))
    request = Request(vision=str(sources.vision), llm=str(llm))
    report = convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    notes = "\n".join(report.notes)
    assert "temperature 0.7, top_p 0.8, top_k 20" in notes and "answers are greedy unless" in notes
    assert "left out of generation_config.json: min_p" in notes
    processor = load_processor(tmp_path / "model")
    assert processor.generation == Generation(**SAID)
    convert_to_hf(tmp_path / "model", tmp_path / "export")
    exported = transformers.GenerationConfig.from_pretrained(tmp_path / "export" / "llm")
    assert {name: getattr(exported, name) for name in SAID} == SAID
    convert_from_hf(Request(crosslmm=str(tmp_path / "export")), tmp_path / "back")
    assert load_processor(tmp_path / "back") == processor


@pytest.mark.parametrize(
    "fields", [{"temperature": "hot"}, {"top_k": 2.5}, {"do_sample": 1}, {"top_p": float("nan")}], ids=str
)
def test_sampling_of_another_type(tmp_path, fields) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"generation_config\.json.*{next(iter(fields))}"):
        generation_of(tmp_path)


@pytest.mark.parametrize("content", [None, {}, {"eos_token_id": 2, "temperature": None}])
def test_a_source_that_says_nothing_of_sampling(tmp_path, content) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert generation_of(tmp_path) == (Generation(), [])
