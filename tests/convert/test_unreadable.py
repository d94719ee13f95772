"""Sources that cannot be converted: the message names the cause, and its fix works."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.source.files import open_source
from crosslmm_jax.convert.source.unreadable import check_readable
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.data.text import load_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import load_model_config, read_json
from crosslmm_jax.utils import guess_meant

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4400\n"


def said(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def convert(sources, out: Path, **changes):
    request = Request(**({"vision": str(sources.vision), "llm": str(sources.tied)} | changes))
    return convert_from_hf(request, out, tokenizer=sources.tokenizer)


def test_a_mistyped_path_is_compared_with_what_is_there(sources, tmp_path) -> None:
    wrong = str(sources.tied).replace("tied", "tyed")
    message = said(lambda: convert(sources, tmp_path / "m", llm=wrong))
    assert message == f"--llm {wrong}: no such file or folder; did you mean {sources.tied}?"
    (tmp_path / "Models" / "model_2b").mkdir(parents=True)
    assert guess_meant(tmp_path / "models" / "model_2b") == f"; did you mean {tmp_path / 'Models'}?"
    assert guess_meant(tmp_path / "Models" / "else") == ""
    assert guess_meant("gs://bucket/model") == "; only files of a mounted disk are read: copy it to one"
    message = said(lambda: load_model_config(tmp_path / "Models" / "model_2c"))
    assert message.endswith(f"writes; did you mean {tmp_path / 'Models' / 'model_2b'}?")


def test_the_name_of_a_repository_on_the_hub(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = said(lambda: check_readable("--llm", "Qwen/Qwen2.5-1.5B-Instruct"))
    assert message.startswith("--llm Qwen/Qwen2.5-1.5B-Instruct: no such file or folder; to get")
    command = re.search(r"`(hf download .*?)`", message)
    assert command is not None and message.endswith("and give Qwen2.5-1.5B-Instruct")
    words = [str(Path(sys.executable).parent / "hf"), *shlex.split(command[1])[1:]]
    result = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert "Local entry not found" in result.stdout + result.stderr, "as far as one comes without a network"
    (tmp_path / "Qwen").mkdir()  # now it is a path
    assert "hf download" not in said(lambda: check_readable("--llm", "Qwen/Qwen2.5-1.5B-Instruct"))


@pytest.mark.parametrize("name", ["model-q4_k_m.gguf", ""])
def test_gguf(tmp_path, name) -> None:
    (tmp_path / "model-q4_k_m.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "is GGUF, whose weights are rounded" in said(lambda: check_readable("--llm", tmp_path / name))


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/base"}))
    safetensors.torch.save_file(
        {"base_model.x.lora_A.weight": torch.zeros(2)}, folder / "adapter_model.safetensors"
    )
    return folder


def merges(sources, calls: list) -> SimpleNamespace:
    """peft, as far as the command uses it: merging gives the tied language model."""

    def from_pretrained(*arguments):
        calls.append(arguments)
        merged = SimpleNamespace(save_pretrained=lambda out: shutil.copytree(sources.tied, out))
        return SimpleNamespace(merge_and_unload=lambda: merged)

    model = SimpleNamespace(from_pretrained=from_pretrained)
    return SimpleNamespace(AutoPeftModelForCausalLM=model, PeftModel=model)


def test_a_lora_adapter_is_merged_first(sources, tmp_path, monkeypatch) -> None:
    folder, calls = adapter(tmp_path / "lora"), []
    message = said(lambda: convert(sources, tmp_path / "model", llm=str(folder)))
    assert message.startswith(f"--llm {folder}: is a LoRA adapter of Qwen/base, not a model; merge it first:")
    assert "is a LoRA adapter" in said(lambda: check_readable("", folder / "adapter_model.safetensors"))
    command = re.search(r"`(python -c .*?)` \(it needs", message)
    assert command is not None
    monkeypatch.setitem(sys.modules, "peft", merges(sources, calls))
    exec(shlex.split(command[1])[2])
    assert calls == [(str(folder),)]
    convert(sources, tmp_path / "model", llm=f"{folder}-merged")
    assert load_model_config(tmp_path / "model").decoder.width == 64


def test_a_lora_adapter_of_llava(sources, tmp_path, monkeypatch) -> None:
    folder, calls = adapter(tmp_path / "lora"), []
    command = re.search(r"`(python -c .*?)` \(it", said(lambda: check_readable("--llava", folder)))
    assert command is not None
    monkeypatch.setitem(sys.modules, "peft", merges(sources, calls))
    model = SimpleNamespace(from_pretrained=lambda base: f"loaded {base}")
    monkeypatch.setattr("transformers.AutoModelForImageTextToText", model)
    exec(shlex.split(command[1])[2])
    assert calls == [("loaded Qwen/base", str(folder))]
    (folder / "non_lora_trainables.bin").write_bytes(b"")
    message = said(lambda: check_readable("--llava", folder))
    assert f"--model-path {folder} --model-base Qwen/base --save-model-path {folder}-merged" in message


def test_types_that_are_not_read_are_no_damage(tmp_path) -> None:
    tensors = {"a.weight": torch.ones(4).to(torch.float8_e4m3fn), "b.weight": torch.ones(3)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    message = said(lambda: open_source(tmp_path).__enter__())
    assert "1 tensor(s), such as a.weight, have the type F8_E4M3, which this project does not read" in message
    assert "float32, bfloat16, float16" in message and "whole" not in message and "again" not in message


@pytest.mark.parametrize("place", ["", "text_config"])
def test_rounded_weights_are_named_by_their_method(sources, tmp_path, place) -> None:
    folder = shutil.copytree(sources.tied, tmp_path / "llm")
    rounded = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config = read_json(folder / "config.json") | ({place: rounded} if place else rounded)
    (folder / "config.json").write_text(json.dumps(config))
    assert 'weights are rounded ("awq")' in said(lambda: check_readable("--llm", folder))


def pointer(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(POINTER)
    return folder


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "config.json", "x.npz"])
def test_a_pointer_of_git_lfs(sources, tmp_path, kind) -> None:
    folder = tmp_path
    if kind == "config.json":
        folder = shutil.copytree(sources.tied, tmp_path / "llm")
    pointer(folder, kind)
    message = said(lambda: open_source(folder).__enter__())
    assert message == (
        f"{folder / kind}: is Git LFS's pointer to the file, not the file; run `git -C {folder} lfs pull`"
    )


def test_a_tokenizer_that_is_a_pointer(sources, tmp_path) -> None:
    folder = shutil.copytree(sources.tokenizer, tmp_path / "tokenizer")
    pointer(folder, "tokenizer.json")
    request = Request(vision=str(sources.vision), llm=str(sources.tied))
    for call in (
        lambda: load_tokenizer(folder),
        lambda: convert_from_hf(request, tmp_path / "m", tokenizer=folder),
    ):
        assert (
            f"tokenizer.json: is Git LFS's pointer to the file, not the file; run `git -C {folder}"
            in said(call)
        )


@pytest.mark.parametrize("kind", ["siglip2", "siglip2_vision_model"])
def test_a_naflex_tower(sources, tmp_path, kind) -> None:
    folder = shutil.copytree(sources.vision, tmp_path / "vision")
    config = read_json(folder / "config.json") | {"model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    message = said(lambda: convert(sources, tmp_path / "m", vision=str(folder)))
    assert "NaFlex" in message and "give the fixed-resolution one" in message


def test_numbers_that_are_not_finite_are_counted_and_named(sources, tmp_path) -> None:
    folder = shutil.copytree(sources.tied, tmp_path / "llm")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][5, :3] = float("nan")
    tensors["model.layers.1.self_attn.q_proj.bias"][0] = float("-inf")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = said(lambda: convert(sources, tmp_path / "model", llm=str(folder)))
    assert message.startswith("2 tensor(s) hold numbers that are not finite")
    assert f"{folder}: model.layers.3.mlp.up_proj.weight: 3 NaN and 0 infinite of 6,144 numbers" in message
    assert f"{folder}: model.layers.1.self_attn.q_proj.bias: 0 NaN and 1 infinite of 64 numbers" in message
    assert not (tmp_path / "model").exists()
    convert(sources, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    ours = safetensors.torch.load_file(path)
    ours["decoder.layers.w_up"][2, 4, 4] = float("inf")
    safetensors.torch.save_file(ours, path)
    message = said(lambda: convert_to_hf(tmp_path / "model", tmp_path / "export"))
    assert f"{path}: decoder.layers.w_up[2]: 0 NaN and 1 infinite of 6,144 numbers" in message
    assert not (tmp_path / "export").exists()


def test_the_largest_numbers_are_finite() -> None:
    from crosslmm_jax.convert.stream import count_not_finite

    for dtype in (np.float32, np.float16, np.dtype("bfloat16")):
        largest = np.array([3e38 if dtype != np.float16 else 65504, -1e-7, 0], np.float64).astype(dtype)
        assert count_not_finite(largest) is None and count_not_finite(largest[:0]) is None
        assert count_not_finite(np.append(largest, np.array([np.nan, -np.inf], dtype))) == (1, 1, 5)


def test_a_checkpoint_of_hugging_face_is_no_model_folder(sources) -> None:
    message = said(lambda: load_model_config(sources.tied))
    assert message.endswith("make a MODEL folder of it with `crosslmm convert from-hf`")
