"""Sources that do not fit: one clear error, and nothing under the final name."""

import errno
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from crosslmm_jax.cli.app import main
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.report import condense
from crosslmm_jax.convert.source.config import decoder_sizes, llava_sizes
from crosslmm_jax.convert.source.files import open_source
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.errors import UserError


@pytest.fixture
def copies(sources, tmp_path):
    """`vision` and `llm` folders that a test may damage."""
    for name, source in (("vision", sources.vision), ("llm", sources.untied)):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


@pytest.fixture
def fails(sources, copies):
    """`fails(match, ...)`: the conversion of the copies fails with that message and leaves no folder."""

    def check(match: str, **changes) -> str:
        before = sorted(os.listdir(copies))
        arguments = {"vision": str(copies / "vision"), "llm": str(copies / "llm")} | changes
        with pytest.raises(UserError, match=match) as caught:
            convert_from_hf(Request(**arguments), copies / "model", tokenizer=sources.tokenizer)
        assert sorted(os.listdir(copies)) == before
        return str(caught.value)

    return check


def edit(folder, change) -> None:
    """Applies `change` to the tensors of a folder with one file."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def edit_config(folder, **fields) -> None:
    """Replaces fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated(copies, fails, keep) -> None:
    path = shards(copies / "llm")[1]
    size = path.stat().st_size
    os.truncate(path, size - 1 if keep == -1 else int(keep * size) if isinstance(keep, float) else keep)
    assert path.name in fails("safetensors file|truncated")


def test_a_header_that_lies(copies, fails) -> None:
    path = copies / "vision" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"X99"', 1))
    fails("has the type X99")
    path.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    fails("fewer than its header says")


def test_missing_shard(copies, fails) -> None:
    gone = shards(copies / "llm")[2]
    gone.unlink()
    fails(f"names {gone.name}, which are missing")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {}}']
)
def test_bad_index(copies, fails, text) -> None:
    (copies / "llm" / "model.safetensors.index.json").write_text(text)
    fails(r"model\.safetensors\.index\.json")


def test_everything_wrong_is_said_at_once(copies, fails) -> None:
    def change(tensors) -> None:
        for i in range(2):
            del tensors[f"encoder.layers.{i}.mlp.fc1.weight"]
            tensors[f"encoder.layers.{i}.mlp.fc9.weight"] = torch.zeros(3)
        tensors["post_layernorm.weight"] = torch.zeros(49)
        tensors["embeddings.extra"] = torch.zeros(3)

    edit(copies / "vision", change)
    message = fails("4 thing")
    assert "\n" not in message
    assert "nothing fills vision_model.encoder.layers.{0-1}.mlp.fc1.weight" in message
    assert "encoder.layers.{0-1}.mlp.fc9.weight is unknown" in message
    assert "embeddings.extra is unknown" in message
    assert "post_layernorm.weight has shape [49] instead of [48]" in message
    assert str(copies / "vision") in message


def test_fewer_rows_than_the_vocabulary(copies, fails) -> None:
    edit_config(copies / "llm", vocab_size=640)
    fails(r"model\.embed_tokens\.weight has shape \[512, 64\] instead of \[640, 64\]")


def test_two_names_for_one_parameter(copies, fails) -> None:
    name = "post_layernorm.weight"
    edit(copies / "vision", lambda tensors: tensors.update({f"vision_model.{name}": tensors[name].clone()}))
    fails("are the same parameter; remove one")


def test_mixed_types(copies, fails, sources) -> None:
    name = "encoder.layers.1.mlp.fc1.weight"
    edit(copies / "vision", lambda tensors: tensors.update({name: tensors[name].half()}))
    message = fails("types are mixed")
    assert f"float16: {name}" in message and "--dtype" in message
    request = Request(vision=str(copies / "vision"), llm=str(copies / "llm"), dtype="float32")
    assert set(convert_from_hf(request, copies / "m", tokenizer=sources.tokenizer).dtypes.values()) == {
        "float32"
    }


def test_no_floats(copies, fails) -> None:
    edit(
        copies / "vision",
        lambda tensors: tensors.update({"post_layernorm.bias": torch.zeros(48, dtype=torch.int8)}),
    )
    fails("post_layernorm.bias has the type int8")


def test_numbers_too_large_for_the_type(copies, fails) -> None:
    edit(copies / "vision", lambda tensors: tensors["post_layernorm.bias"].fill_(1e6))
    fails("post_layernorm.bias holds numbers too large for float16", dtype="float16")


def test_the_wrong_kind_of_source(copies, fails, sources) -> None:
    fails("model_type is 'qwen2'.*give it as --llm", vision=str(sources.untied))
    fails("model_type is 'siglip_vision_model'.*give it as --vision", llm=str(sources.vision))
    fails("give it as --llava", llm=str(sources.llava["hf"]))
    fails("give it as --llava", llm=str(sources.llava["original"]))
    fails("give --vision and --llm", vision=None, llm=None, llava=str(sources.untied))
    with pytest.raises(UserError, match="give --vision with --llm, or --llava"):
        Request(vision="x")
    with pytest.raises(UserError, match="choose one of float32"):
        Request(vision="x", llm="y", dtype="int8")


@pytest.mark.parametrize(
    "name", ["num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings"]
)
def test_a_missing_size_is_no_guess(copies, fails, name) -> None:
    edit_config(copies / "llm", **{name: None})
    fails(rf"config\.json: field {name} is missing")


def test_configs_that_cannot_be_converted(copies, fails) -> None:
    edit_config(copies / "llm", rope_parameters=None)
    fails("field rope_theta is missing")
    edit_config(copies / "llm", rope_theta=1e6, use_sliding_window=True)
    fails("field use_sliding_window is True")
    edit_config(copies / "llm", use_sliding_window=None, layer_types=["full_attention", "sliding_attention"])
    fails("field layer_types is .* only full_attention")
    edit_config(copies / "llm", layer_types=None)
    edit_config(copies / "vision", hidden_act="relu")
    fails("field hidden_act is 'relu'")
    edit_config(copies / "vision", hidden_act=None, num_attention_heads=None)
    fails("field num_attention_heads is missing")
    edit_config(copies / "vision", model_type="siglip2")
    fails("fixed-resolution")
    (copies / "vision" / "config.json").unlink()
    fails(r"config\.json: is missing")


PLAIN = {"rope_type": "default", "rope_theta": 5e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 5e4}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"rope_scaling": {"rope_type": "default", "type": "yarn"}},
            "by 'default' and 'yarn'; only",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales rotary positions by 'linear'; only"),
        ({"rope_scaling": YARN}, "rope_parameters and rope_scaling differ; keep"),
        ({"rope_parameters": YARN | {"factor": None}}, "rope_parameters.factor is None; YaRN needs"),
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast is 16; only 32 can be converted"),
        ({"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor is 2.0; only 1.1386"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "mscale is 0.7; the decoder has no such constant"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate is False; only true can be converted"),
        ({"rope_scaling": PLAIN | {"rope_theta": 1e6}}, "rope_scaling.rope_theta 1000000.0 differ; keep"),
        ({"rope_scaling": {"type": "default"}}, "rope_scaling.rope_theta None differ; keep the one"),
        ({"rope_theta": 1e6}, "rope_parameters.rope_theta 50000.0, rope_theta 1000000.0 differ"),
        ({"rope_parameters": PLAIN | {"factor": 2.0}}, "rope_parameters.factor is 2.0; the decoder has no"),
        (
            {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
            "factor is 0.5; only 1 can",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["llm", "llava"])
def test_positions_that_the_decoder_does_not_have(sources, tmp_path, kind, fields, match) -> None:
    """Also where a class of transformers would choose between two fields."""
    source = sources.tied if kind == "llm" else sources.llava["hf"]
    config = json.loads((source / "config.json").read_text())
    (config if kind == "llm" else config["text_config"]).update({"rope_parameters": PLAIN} | fields)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: .*{match}"):
        decoder_sizes(tmp_path) if kind == "llm" else llava_sizes(tmp_path, has_head=True)


def test_a_preset_that_does_not_fit(fails) -> None:
    message = fails("--preset crosslmm_2b does not fit", preset="crosslmm_2b")
    for part in ("vision.width is 48, the preset's is 1152", "decoder.num_heads is 4", "decoder.rope_theta",
                 "decoder.num_layers is 5", "vision.depth (layers up to its features) is 2",
                 "decoder.vocab_size is 512"):  # fmt: skip
        assert part in message


def test_overrides_are_checked(fails) -> None:
    fails(
        "CrossAttentionConfig.cross_attn_offset is 9", overrides=("--cross-attention.cross-attn-offset", "9")
    )
    fails("--merge.grid takes an integer", overrides=("--merge.grid", "many"))


class Opens:
    """Pickles to a call, which must never be made."""

    def __reduce__(self):
        return (os.mkdir, ("/tmp/a_pickle_was_executed",))


def test_a_pickle_is_never_executed(tmp_path) -> None:
    torch.save({"w": torch.zeros(2), "evil": Opens()}, tmp_path / "a.bin")
    (tmp_path / "b.bin").write_bytes(pickle.dumps({"w": Opens()}))
    np.savez(tmp_path / "c.npz", w=np.array([Opens()], dtype=object))
    for name in ("a.bin", "b.bin", "c.npz"):
        with pytest.raises(UserError, match=name), open_source(tmp_path / name) as source:
            source.read("w")
    assert not os.path.exists("/tmp/a_pickle_was_executed")


def test_torch_files_hold_tensors_only(tmp_path) -> None:
    torch.save({"w": torch.zeros(2), "step": 3}, tmp_path / "a.bin")
    torch.save([torch.zeros(2)], tmp_path / "b.bin")
    torch.save({"w": torch.zeros(200)}, tmp_path / "c.bin")
    os.truncate(tmp_path / "c.bin", 300)
    for name, match in (
        ("a.bin", "no state dict"),
        ("b.bin", "no state dict"),
        ("c.bin", "cannot be read|else than"),
    ):
        with pytest.raises(UserError, match=match), open_source(tmp_path / name):
            pass


def test_a_torch_file_may_hold_parameters(tmp_path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        module = torch.nn.Linear(2, 3, dtype=dtype)
        torch.save(dict(module.named_parameters()), tmp_path / "a.bin")
        with open_source(tmp_path / "a.bin") as source:
            read = source.read("weight")
        assert np.array_equal(read.astype(np.float32), module.weight.detach().float().numpy())


def test_torch_is_no_dependency(tmp_path, monkeypatch) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with (
        pytest.raises(UserError, match="pip install torch, or save it as safetensors"),
        open_source(tmp_path / "a.bin"),
    ):
        pass


def test_damaged_npz(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", **{"params/img/pos_embedding": np.zeros((1, 4, 3), np.float32)})
    os.truncate(tmp_path / "a.npz", 100)
    with pytest.raises(UserError, match=r"a\.npz: is no whole"), open_source(tmp_path / "a.npz"):
        pass


@pytest.mark.parametrize("content", [None, "README.md"])
def test_nothing_to_read(tmp_path, content) -> None:
    if content:
        (tmp_path / content).write_text("x")
    with pytest.raises(UserError, match="give a checkpoint"), open_source(tmp_path):
        pass
    with pytest.raises(UserError, match="no such file"), open_source(tmp_path / "gone"):
        pass


def test_a_full_disk(copies, fails, monkeypatch) -> None:
    def full(*arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    fails(r"cannot be written \(No space left on device\); free space there or name another folder")


@pytest.fixture
def small_disk(mount_disk):
    return mount_disk(kilobytes=512)


def test_a_disk_that_is_really_full(sources, small_disk, tmp_path) -> None:
    request = Request(vision=str(sources.vision), llm=str(sources.untied))
    with pytest.raises(UserError, match=r"disk/model: cannot be written \(No space left on device\); free"):
        convert_from_hf(request, small_disk / "model", tokenizer=sources.tokenizer)
    assert list(small_disk.iterdir()) == []
    convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    with pytest.raises(UserError, match=r"disk/export: cannot be written \(No space left on device\); free"):
        convert_to_hf(tmp_path / "model", small_disk / "export")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_later_keeps_the_older_model(sources, copies, fails, monkeypatch) -> None:
    request = Request(vision=str(copies / "vision"), llm=str(copies / "llm"))
    convert_from_hf(request, copies / "model", tokenizer=sources.tokenizer)
    before, calls, pwrite = (copies / "model" / "model.safetensors").read_bytes(), [], os.pwrite

    def fills_up(*arguments) -> int:
        calls.append(1)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr("os.pwrite", fills_up)
    fails("No space left on device")
    assert (copies / "model" / "model.safetensors").read_bytes() == before


def test_a_folder_that_is_no_model_is_left_alone(sources, copies, fails) -> None:
    (copies / "model").mkdir()
    (copies / "model" / "thesis.tex").write_text("x")
    fails("is no MODEL folder; it is left alone")
    assert [path.name for path in (copies / "model").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["convert"], "required: COMMAND"),
        (["convert", "from-hf"], "required: --out"),
        (["convert", "from-hf", "--out", "m"], "give --vision with --llm, or --llava"),
        (
            ["convert", "from-hf", "--vision", "no", "--llm", "nope", "--out", "m"],
            "--llm nope: no such file or folder",
        ),
        (["convert", "from-hf", "--merge.gird", "3", "--out", "m"], "unrecognized arguments: --merge.gird"),
        (
            ["convert", "from-hf", "--vision.width", "8", "--out", "m"],
            "unrecognized arguments: --vision.width",
        ),
        (["convert", "to-hf", "no_model", "--out", "m"], "no_model: no such folder"),
    ],
)
def test_mistakes_on_the_command_line(words, match, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert match in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_condensed_names() -> None:
    names = [f"a.{i}.fc1.w" for i in (0, 1, 2, 5)] + ["a.0.fc2.w", "b/block_1/k", "b/block_2/k", "plain"]
    assert condense(names) == ["a.0.fc2.w", "a.{0-2,5}.fc1.w", "b/block_{1-2}/k", "plain"]
