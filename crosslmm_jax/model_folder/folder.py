"""The MODEL folder: all that is needed to run a model, in files that describe themselves.

config.json         ModelConfig
processor.json      how frames and prompts are made: `Processor`
model.safetensors   weights, under this project's parameter names joined by "."; or shards and an index
tokenizer.json ...  what `AutoTokenizer` reads
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from crosslmm_jax.config import ModelConfig, SamplingConfig, TimeInstruction
from crosslmm_jax.config_io import from_dict, to_dict
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params
from crosslmm_jax.model_folder.weights import INDEX_FILE, SINGLE_FILE, read_weights, write_weights
from crosslmm_jax.utils import atomic_folder, is_vacant

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "processor.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """How a video and a question become a batch: the part of the data settings that a model depends on."""

    image_size: int  # pixels, square
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixels in 0..1, red, green, blue
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resampling: Literal["bicubic", "bilinear"] = "bicubic"
    tokens_per_frame: int
    sampling: SamplingConfig
    system_prompt: str
    time_instruction: TimeInstruction = "none"


def save_model_folder(
    folder: str | Path,
    *,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer_folder: str | Path,
    sampling: SamplingConfig,
    system_prompt: str,
    time_instruction: TimeInstruction = "none",
    resampling: Literal["bicubic", "bilinear"] = "bicubic",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Writes a MODEL folder, under another name until it is complete; an older one is replaced only then.

    Every process of a run calls this; process 0 writes.

    Args:
      folder: to write.
      config: of the model.
      params: its parameters, possibly sharded.
      tokenizer_folder: whose tokenizer files are copied.
      sampling: which frames of a video the model was trained on.
      system_prompt: it was trained with.
      time_instruction: what it was told about each video in training.
      resampling: with which frames were resized.
      dtype: of the weights in the files.

    Raises:
      UserError: `folder` holds something that is no MODEL folder or cannot be written, or
        `tokenizer_folder` has no tokenizer.
    """
    folder = Path(folder)
    check_replaceable(folder)
    processor = make_processor(
        config, sampling=sampling, system_prompt=system_prompt, time_instruction=time_instruction,
        resampling=resampling,
    )  # fmt: skip
    writes = jax.process_index() == 0
    with atomic_folder(folder, resume=False) if writes else contextlib.nullcontext(folder) as building:
        if writes:
            write_settings(building, config, processor)
            copy_tokenizer(tokenizer_folder, building)
        write_weights(building, params, dtype=dtype)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"saved {folder}")


def make_processor(
    config: ModelConfig,
    *,
    sampling: SamplingConfig,
    system_prompt: str,
    time_instruction: TimeInstruction = "none",
    resampling: Literal["bicubic", "bilinear"] = "bicubic",
) -> Processor:
    """The `Processor` of a model; what its encoder says about pixels is taken from `config`."""
    vision = config.vision
    return Processor(
        image_size=vision.image_size, image_mean=vision.image_mean, image_std=vision.image_std,
        resampling=resampling, tokens_per_frame=config.merge.tokens_per_frame, sampling=sampling,
        system_prompt=system_prompt, time_instruction=time_instruction,
    )  # fmt: skip


def write_settings(folder: Path, config: ModelConfig, processor: Processor) -> None:
    """Writes the two JSON files of a MODEL folder."""
    write_json(folder / CONFIG_FILE, to_dict(config))
    write_json(folder / PROCESSOR_FILE, to_dict(processor))


def check_replaceable(folder: str | Path) -> None:
    """Raises a `UserError` when `folder` exists and is neither empty nor a MODEL folder."""
    folder = Path(folder)
    if not is_model_folder(folder) and not is_vacant(folder):
        raise UserError(f"{folder}: exists and is no MODEL folder; it is left alone: give another name")


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copies the tokenizer files of the folder `source`; raises `UserError` when there are none."""
    names = [name for name in _TOKENIZER_FILES if (Path(source) / name).is_file()]
    if not {"tokenizer.json", "vocab.json"} & set(names):
        raise UserError(f"{source}: has no tokenizer.json or vocab.json; give a tokenizer's folder")
    for name in names:
        shutil.copyfile(Path(source) / name, folder / name)


def is_model_folder(folder: str | Path) -> bool:
    """Whether `folder` has the files of a MODEL folder (which may still be damaged)."""
    present = {name: (Path(folder) / name).is_file() for name in _required()}
    weights = present.pop(SINGLE_FILE) or (Path(folder) / INDEX_FILE).is_file()
    return weights and all(present.values())


def check_model_folder(folder: str | Path) -> None:
    """Raises a `UserError` naming every file that the MODEL folder lacks."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a MODEL folder, as `crosslmm train` writes")
    missing = [name for name in _required() if not (folder / name).is_file()]
    if (folder / INDEX_FILE).is_file() and SINGLE_FILE in missing:
        missing.remove(SINGLE_FILE)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        missing.append("tokenizer.json")
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}; give a complete MODEL folder")


def _required() -> tuple[str, ...]:
    return (CONFIG_FILE, PROCESSOR_FILE, SINGLE_FILE)


def load_model_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of a MODEL folder; raises `UserError` naming file and field."""
    check_model_folder(folder)
    path = Path(folder) / CONFIG_FILE
    return from_dict(ModelConfig, _read_json(path), source=path)


def load_processor(folder: str | Path) -> Processor:
    """The `Processor` of a MODEL folder; raises `UserError` naming file and field."""
    check_model_folder(folder)
    path = Path(folder) / PROCESSOR_FILE
    return from_dict(Processor, _read_json(path), source=path)


def load_weights(
    folder: str | Path, config: ModelConfig, *, shardings: Any = None, dtype: str | None = None
) -> dict[str, Any]:
    """The parameters of a MODEL folder, each tensor read straight into its shards.

    Args:
      folder: a MODEL folder.
      config: which parameters there must be, and their shapes.
      shardings: a tree like the parameters (`parallel.param_shardings`); None: the default device.
      dtype: of the result, e.g. "float32"; None keeps that of the files.

    Raises:
      UserError: files are missing or damaged, or do not hold exactly the parameters of `config`.
    """
    check_model_folder(folder)
    expected = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return read_weights(Path(folder), expected, shardings=shardings, dtype=dtype)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no readable JSON ({error}); write the folder again") from error


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
