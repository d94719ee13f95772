"""An export back in: the MODEL folder that it was made from, byte for byte."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from crosslmm_jax import presets
from crosslmm_jax.cli.app import main
from crosslmm_jax.config import CrossAttentionConfig, MergeConfig, ModelConfig, SamplingConfig
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params
from crosslmm_jax.model_folder import load_processor, save_model_folder

CROSS = ("--cross-attention.cross-attn-every", "2", "--cross-attention.gate-init", "0.5")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))}


def random_params(config: ModelConfig) -> dict:
    """No parameter is a copy of another, a constant, or one that a conversion would start with."""
    tree = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), tree)


def trained_config(**changes) -> ModelConfig:
    small = presets.tiny()
    decoder = dataclasses.replace(small.decoder, vocab_size=512, tie_embeddings=changes.pop("tied", True))
    return dataclasses.replace(small, decoder=decoder, **changes)


TRAINED = {
    "tied": {},
    "untied, another projector": {
        "tied": False,
        "merge": MergeConfig(grid=2, pooling="bilinear", projector_input_norm=True),
        "attention": "reference",
    },
    "keys of the encoder, one direction": {
        "cross_attention": CrossAttentionConfig(
            cross_attn_every=2, cross_attn_offset=1, directions=("t2v",), kv_source="encoder", gate_init=0.1
        ),
        "compute_dtype": "float32",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_model_comes_back(sources, tmp_path, name, dtype) -> None:
    config = trained_config(**TRAINED[name])
    save_model_folder(
        tmp_path / "model", config=config, params=random_params(config), tokenizer_folder=sources.tokenizer,
        sampling=SamplingConfig(policy="fps", frames=7, fps=0.5), system_prompt="Sieh genau hin. 看",
        resampling="bilinear", dtype=dtype,
    )  # fmt: skip
    convert_to_hf(tmp_path / "model", tmp_path / "export")
    report = convert_from_hf(Request(crosslmm=str(tmp_path / "export")), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "model")
    assert not report.fresh and not report.copied and not report.ignored


@pytest.fixture(scope="module")
def mixed(sources, tmp_path_factory):
    """A MODEL of a float32 tower, a bfloat16 decoder and a float16 projector, and its export."""
    root = tmp_path_factory.mktemp("mixed")
    shapes = {"0.weight": (64, 48), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    torch.save(
        {f"model.mm_projector.{name}": torch.randn(shape).half() for name, shape in shapes.items()},
        root / "mm_projector.bin",
    )
    request = Request(
        vision=str(sources.vision), llm=str(sources.untied), projector=str(root / "mm_projector.bin"),
        overrides=CROSS,
    )  # fmt: skip
    report = convert_from_hf(request, root / "model", tokenizer=sources.tokenizer)
    assert report.dtypes == {
        "encoder": "float32", "decoder": "bfloat16", "v2v": "bfloat16", "t2v": "bfloat16",
        "projector": "float16",
    }  # fmt: skip
    convert_to_hf(root / "model", root / "export")
    return root


@pytest.fixture
def export(mixed, tmp_path) -> Path:
    """A copy of the export that a test may damage."""
    return shutil.copytree(mixed / "export", tmp_path / "export")


def llava_told(sources, folder: Path, told: object) -> Request:
    """LLaVA in its original layout, with the field `add_time_instruction`."""
    source = shutil.copytree(sources.llava["original"], folder)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"add_time_instruction": told}))
    return Request(llava=str(source), vision=str(sources.vision), overrides=CROSS)


@pytest.mark.slow
@pytest.mark.parametrize(("told", "kind"), [(True, "full"), (False, "none"), (None, "none")])
def test_the_time_instruction_of_llava_video_is_kept(sources, tmp_path, told, kind) -> None:
    request = llava_told(sources, tmp_path / "llava", told)
    report = convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    assert load_processor(tmp_path / "model").time_instruction == kind
    noted = "full time instruction about each video, from the source's config.json" in report.notes
    assert noted == (kind == "full")
    convert_to_hf(tmp_path / "model", tmp_path / "export")
    convert_from_hf(Request(crosslmm=str(tmp_path / "export")), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "model")


def test_a_time_instruction_that_is_no_flag(sources, tmp_path) -> None:
    request = llava_told(sources, tmp_path / "llava", "yes")
    with pytest.raises(UserError, match="field add_time_instruction is 'yes'; it must be true or false"):
        convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)


def test_mixed_types_come_back(mixed, tmp_path) -> None:
    convert_from_hf(Request(crosslmm=str(mixed / "export")), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(mixed / "model")


def test_the_folder_of_the_whole_is_enough(mixed, tmp_path, monkeypatch) -> None:
    """Also in shards, which the MODEL folder need not have."""
    monkeypatch.setattr("crosslmm_jax.convert.to_hf.MAX_SHARD_BYTES", 100_000)
    convert_to_hf(mixed / "model", tmp_path / "export")
    alone = shutil.copytree(tmp_path / "export" / "crosslmm", tmp_path / "alone")
    assert len(list(alone.glob("*.safetensors"))) > 5
    shutil.rmtree(tmp_path / "export")
    convert_from_hf(Request(crosslmm=str(alone)), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(mixed / "model")


def test_the_command_line(mixed, tmp_path, capsys) -> None:
    words = ["convert", "from-hf", "--crosslmm", str(mixed / "export"), "--out", str(tmp_path / "back")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "parameters initialised fresh: 0" in out and "bilinear" not in out
    assert contents(tmp_path / "back") == contents(mixed / "model")
    assert main([*words, "--preset", "tiny", "--merge.grid", "1", "--llava", "x"]) == 2
    assert "drop --llava, --preset, --merge.grid" in capsys.readouterr().err


def test_another_type(mixed, tmp_path) -> None:
    report = convert_from_hf(Request(crosslmm=str(mixed / "export"), dtype="float32"), tmp_path / "back")
    assert set(report.dtypes.values()) == {"float32"}


@pytest.mark.parametrize("name", ["vision", "llm", "llava", "projector", "preset"])
def test_nothing_else_is_given_with_it(name) -> None:
    with pytest.raises(UserError, match=f"all settings; drop --{name}"):
        Request(crosslmm="x", **{name: "y"})


def edit(export: Path, change) -> None:
    """Applies `change` to the tensors of cross.safetensors, and to their index."""
    folder = export / "crosslmm"
    tensors = safetensors.torch.load_file(folder / "cross.safetensors")
    before = set(tensors)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "cross.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    kept = {name: file for name, file in index["weight_map"].items() if name not in before - set(tensors)}
    index["weight_map"] = kept | dict.fromkeys(tensors, "cross.safetensors")
    path.write_text(json.dumps(index))


def fails(export: Path, match: str) -> str:
    with pytest.raises(UserError, match=match) as caught:
        convert_from_hf(Request(crosslmm=str(export)), export.parent / "back")
    assert [path.name for path in export.parent.iterdir()] == ["export"]
    return str(caught.value)


def test_all_missing_keys_are_listed(export) -> None:
    def change(tensors) -> None:
        del tensors["model.layers.2.v2v_gate"]
        del tensors["model.layers.0.t2v_attn.q_proj.weight"]
        del tensors["model.layers.4.t2v_attn.q_proj.weight"]
        del tensors["multi_modal_projector.linear_2.bias"]
        tensors["model.layers.1.v2v_gate"] = torch.zeros(())
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(65)

    edit(export, change)
    message = fails(export, r"--crosslmm .*export/crosslmm: ")
    for part in (
        "nothing fills model.layers.2.v2v_gate", "nothing fills model.layers.{0,4}.t2v_attn.q_proj.weight",
        "nothing fills multi_modal_projector.linear_2.bias", "model.layers.1.v2v_gate is unknown",
        "multi_modal_projector.linear_1.bias has shape [65] instead of [64]",
    ):  # fmt: skip
        assert part in message


def test_each_part_has_one_type(export) -> None:
    name = "model.layers.2.v2v_attn.q_proj.weight"
    edit(export, lambda tensors: tensors.update({name: tensors[name].float()}))
    assert f"float32: {name}" in fails(export, "types are mixed")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda config: config["crosslmm"]["merge"].pop("grid"),
            "crosslmm: field merge.grid is missing",
        ),
        (lambda config: config.pop("processor"), "field processor: the configuration is None"),
        (lambda config: config["processor"].update(image_size="28"), "field processor: field image_size"),
        (lambda config: config.update(model_type="qwen2"), "field model_type is 'qwen2'"),
        (
            lambda config: config["crosslmm"]["decoder"].update(num_layers=6),
            "decoder.num_layers is 5 in text_config and 6 in crosslmm; make them agree",
        ),
        (
            lambda config: config["text_config"].update(rope_scaling={"type": "yarn", "factor": 4.0}),
            "decoder.yarn_factor is 4.0 in text_config and 1.0 in crosslmm",
        ),
        (lambda config: config["vision_config"].update(patch_size=7), "vision.patch_size is 7 in vision_con"),
    ],
)
def test_settings_that_do_not_fit(export, change, match) -> None:
    path = export / "crosslmm" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    fails(export, match)


def test_a_part_is_no_export(export) -> None:
    with pytest.raises(UserError, match="field model_type is 'qwen2'; give --crosslmm the folder"):
        convert_from_hf(Request(crosslmm=str(export / "llm")), export.parent / "back")
