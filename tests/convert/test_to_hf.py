"""A MODEL folder out again: Hugging Face's classes load it, and every bit is the one that came in."""

import importlib.util
import json

import pytest
import torch
import transformers

from crosslmm_jax.cli.app import main
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import load_model_config

CROSS = ("--cross-attention.cross-attn-every", "2", "--cross-attention.gate-init", "0.5")


def requests(sources) -> dict[str, Request]:
    """One for each layout that weights come in."""
    found = {
        f"{vision}_{llm}": Request(
            vision=str(getattr(sources, vision)), llm=str(getattr(sources, llm)), overrides=CROSS
        )  # fmt: skip
        for vision, llm in (("vision", "tied"), ("two_tower", "untied"))
    }
    for layout, folder in sources.llava.items():
        vision = str(sources.vision) if layout == "original" else None
        overrides = (*CROSS, "--decoder.vocab-size", "512")
        found[layout] = Request(llava=str(folder), vision=vision, overrides=overrides)
    return found


@pytest.fixture(scope="module")
def exported(sources, tmp_path_factory):
    """name -> export folder, made on the way of a request."""
    root = tmp_path_factory.mktemp("exports")
    for name, request in requests(sources).items():
        convert_from_hf(request, root / "models" / name, tokenizer=sources.tokenizer)
        convert_to_hf(root / "models" / name, root / name)
    return root


NAMES = ["vision_tied", "two_tower_untied", "original", "hf", "hf_4_52", "hf_5"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_it_without_a_key_too_few_or_too_many(exported, name) -> None:
    for part, cls in (("vision", transformers.SiglipVisionModel), ("llm", transformers.Qwen2ForCausalLM)):
        _, info = cls.from_pretrained(exported / name / part, output_loading_info=True)
        assert not any(info.values()), (part, info)


def known(name: str) -> str | None:
    """The name in an export of a tensor of any of these sources, written down independently."""
    for old in ("model.vision_tower.", "vision_tower."):
        name = name.replace(old, "vision_model.") if name.startswith(old) else name
    name = name.replace("vision_model.vision_tower.", "vision_model.").replace(
        "vision_model.vision_model.", "vision_model."
    )
    name = name.removeprefix("vision_model.vision_model.")
    if name.startswith(("embeddings.", "encoder.", "post_layernorm.", "head.")):
        name = f"vision_model.{name}"
    name = name.replace("language_model.model.", "model.").replace("model.language_model.", "model.")
    name = name.removeprefix("language_model.")
    name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
    for number, layer in (("0", "linear_1"), ("2", "linear_2")):
        name = name.replace(f"model.mm_projector.{number}.", f"multi_modal_projector.{layer}.")
    left_out = ("text_model.", "logit_", "vision_model.head.", "vision_model.encoder.layers.2.")
    return None if name.startswith(left_out) or name.endswith("image_newline") else name


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_equal(sources, exported, load_tensors, bit_equal, name) -> None:
    if name in sources.llava:
        folders = [sources.llava[name]]
    else:
        vision, llm = name.rsplit("_", 1)
        folders = [getattr(sources, vision), getattr(sources, llm)]
    out, seen = load_tensors(exported / name / "crosslmm"), set()
    for folder in folders:
        for key, value in load_tensors(folder).items():
            target = known(key)
            if target is not None:
                value = value[:512] if value.shape[0] == 576 else value
                assert bit_equal(out[target], value), key
                seen.add(target)
    new = {key for key in out if "v2v_" in key or "t2v_" in key}
    if name not in sources.llava:
        new |= {key for key in out if key.startswith("multi_modal_projector.")}
    assert set(out) == seen | new and not seen & new


def test_there_and_back_and_there_again(sources, exported, tmp_path) -> None:
    """Both halves of an export are sources themselves, and give the same weights."""
    folder = exported / "two_tower_untied"
    request = Request(vision=str(folder / "vision"), llm=str(folder / "llm"), overrides=CROSS)
    convert_from_hf(request, tmp_path / "model")  # with its own tokenizer
    first, second = (
        path / "model.safetensors" for path in (exported / "models" / "two_tower_untied", tmp_path / "model")
    )
    assert first.read_bytes() == second.read_bytes()
    assert load_model_config(tmp_path / "model").vision.depth == 2


def test_what_the_whole_holds(exported) -> None:
    folder = exported / "vision_tied" / "crosslmm"
    config = json.loads((folder / "config.json").read_text())
    assert config["crosslmm"]["cross_attention"]["cross_attn_every"] == 2
    assert config["processor"]["tokens_per_frame"] == 9
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    gates = {name for name in index["weight_map"] if name.endswith("_gate")}
    assert gates == {f"model.layers.{i}.{d}_gate" for i in (0, 2, 4) for d in ("v2v", "t2v")}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0 < size - index["metadata"]["total_size"] < 40_000
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder.parent / "llm")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") > 0
    processor = json.loads((folder.parent / "vision" / "preprocessor_config.json").read_text())
    assert (processor["size"], processor["resample"]) == ({"height": 28, "width": 28}, 3)


def test_shards(exported, tmp_path, load_tensors, bit_equal, monkeypatch) -> None:
    monkeypatch.setattr("crosslmm_jax.convert.to_hf.MAX_SHARD_BYTES", 150_000)
    convert_to_hf(exported / "models" / "two_tower_untied", tmp_path / "out")
    assert len(list((tmp_path / "out" / "llm").glob("model-*-of-*.safetensors"))) > 2
    _, info = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path / "out" / "llm", output_loading_info=True
    )
    assert not any(info.values())
    whole, before = (
        load_tensors(path / "crosslmm") for path in (tmp_path / "out", exported / "two_tower_untied")
    )
    assert set(whole) == set(before) and all(bit_equal(whole[name], before[name]) for name in whole)


def test_the_command_line(sources, exported, tmp_path, capsys) -> None:
    words = ["convert", "from-hf", "--vision", str(sources.vision), "--llm", str(sources.tied), "--out",
             str(tmp_path / "model"), "--tokenizer", str(sources.tokenizer), "--merge.grid", "1",
             "--cross-attention.gate-init", "-0.25",
             "--cross-attention.directions", "v2v", "t2v"]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "keys used:" in out and "MB/s" in out and f"written: {tmp_path / 'model'}" in out
    config = load_model_config(tmp_path / "model")
    assert (config.merge.grid, config.cross_attention.gate_init) == (1, -0.25)
    words = ["convert", "to-hf", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--json", "-",
             "--torch-reference", "--dtype", "float32"]  # fmt: skip
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["written"]) > 100 and set(report["dtypes"].values()) == {"float32"}
    file = tmp_path / "out" / "crosslmm" / "modeling_crosslmm.py"
    spec = importlib.util.spec_from_file_location("modeling_crosslmm", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.CrossLMM.from_folder(file.parent)
    gates = [value for name, value in model.named_parameters() if name.endswith("v2v_gate")]
    assert gates and all(torch.equal(gate, torch.tensor(-0.25)) for gate in gates)


def test_an_unrelated_folder_is_left_alone(exported, tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    with pytest.raises(UserError, match="is no export; it is left alone"):
        convert_to_hf(exported / "models" / "hf", tmp_path / "photos")
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.png"]


def test_an_older_export_is_replaced(exported, tmp_path) -> None:
    convert_to_hf(exported / "models" / "hf", tmp_path / "out", dtype="float32")
    convert_to_hf(exported / "models" / "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "llm" / "config.json").read_text())["torch_dtype"] == "float16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
