"""Checkpoints in forms that cannot be converted: what each is, and how to get one that can."""

import json
import re
import shlex
from pathlib import Path

from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import read_json
from crosslmm_jax.utils import guess_meant

_GGUF = "is GGUF, whose weights are rounded; give the safetensors folder that it was made from"
_ADAPTER = "adapter_config.json"
_MERGE = {
    "--llm": "from peft import AutoPeftModelForCausalLM as M; M.from_pretrained({adapter!r})",
    "--llava": "from peft import PeftModel; from transformers import AutoModelForImageTextToText as M;"
    " PeftModel.from_pretrained(M.from_pretrained({base!r}), {adapter!r})",
}


def check_readable(option: str, path: str | Path) -> None:
    """Raises a `UserError` for what is known not to be a checkpoint that this project reads.

    Args:
      option: that names it on the command line, or "" if none does.
      path: a file or a folder.
    """
    where, path = f"{option} {path}".strip(), Path(path)
    if not path.exists():
        raise UserError(f"{where}: no such file or folder{_of_hub(path)}{guess_meant(path)}")
    if path.is_file():
        if path.suffix == ".gguf":
            raise UserError(f"{where}: {_GGUF}")
        if path.stem == "adapter_model":
            raise UserError(f"{where}: {_merge(option, path.parent)}")
        return
    files = {file.suffix for file in path.iterdir() if file.is_file()}
    whole = any(path.glob("model*.safetensors")) or any(path.glob("pytorch_model*.bin"))
    if (path / _ADAPTER).is_file() and not whole:
        raise UserError(f"{where}: {_merge(option, path)}")
    if ".gguf" in files and not files & {".safetensors", ".bin", ".npz"}:
        raise UserError(f"{where}: {_GGUF}")
    if (path / "config.json").is_file():
        _check_unquantised(where, path / "config.json")


def _of_hub(path: Path) -> str:
    """How to get a folder of the Hugging Face Hub, if `path` may be a name there."""
    name = str(path)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or Path(name).parent.exists():
        return ""
    return (
        f"; to get the repository of this name from the Hugging Face Hub, run `hf download {name}"
        f" --local-dir {path.name}` and give {path.name}"
    )


def _merge(option: str, folder: Path) -> str:
    """How to merge a LoRA adapter."""
    described = read_json(folder / _ADAPTER) if (folder / _ADAPTER).is_file() else {}
    base, merged = str(described.get("base_model_name_or_path") or "BASE"), f"{folder}-merged"
    told = f"is a LoRA adapter of {base}, not a model; merge it first:"
    if option not in _MERGE or (folder / "non_lora_trainables.bin").is_file():  # LLaVA's own training
        return (
            f"{told} run scripts/merge_lora_weights.py of the LLaVA that trained it, with --model-path"
            f" {folder} --model-base {base} --save-model-path {merged}, and give {merged}"
        )
    code = _MERGE[option].format(adapter=str(folder), base=base)
    code += f".merge_and_unload().save_pretrained({merged!r})"
    return (
        f"{told} `python -c {shlex.quote(code)}` (it needs `pip install peft`), and give {merged}, with"
        " --tokenizer if it holds none"
    )


def _check_unquantised(where: str, path: Path) -> None:
    stored = read_json(path)
    nested = stored.get("text_config")
    for config in (stored, nested if isinstance(nested, dict) else {}):
        quantised = config.get("quantization_config")
        if not quantised:
            continue
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{where}: field quantization_config of config.json says that the weights are rounded"
            f" ({json.dumps(method)}), which this project does not read; give the checkpoint in bfloat16 that"
            " it was made from"
        )
