"""The two JSON files of a MODEL folder: config.json and processor.json."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from crosslmm_jax.config import ModelConfig, SamplingConfig, TimeInstruction
from crosslmm_jax.config_io import from_dict, to_dict
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model_folder.contents import CONFIG_FILE, PROCESSOR_FILE, check_model_folder
from crosslmm_jax.model_folder.json_file import read_json, write_json

END_TOKENS = ("<|im_end|>", "<|endoftext|>")  # of a turn and of a text
Resampling = Literal["bicubic", "bilinear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How the source of the weights says that tokens are drawn; None: it does not say.

    Answering does not read it: an answer is greedy unless a user asks for sampling. `convert to-hf` writes it
    back into generation_config.json.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"Generation.{name} is {value}; it must be a finite number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """How a video and a question become a batch: the data settings that a model depends on."""

    image_size: int  # pixels, square
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of pixels in 0..1, red, green, blue
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resampling: Resampling = "bicubic"
    tokens_per_frame: int
    sampling: SamplingConfig
    system_prompt: str
    time_instruction: TimeInstruction = "none"
    end_tokens: tuple[str, ...] = END_TOKENS  # any of them ends an answer
    generation: Generation = Generation()


def make_processor(
    config: ModelConfig,
    *,
    sampling: SamplingConfig,
    system_prompt: str,
    time_instruction: TimeInstruction = "none",
    resampling: Resampling = "bicubic",
) -> Processor:
    """The `Processor` of a model. Size, mean and std of pixels come from `config.vision`."""
    vision = config.vision
    return Processor(
        image_size=vision.image_size, image_mean=vision.image_mean, image_std=vision.image_std,
        resampling=resampling, tokens_per_frame=config.merge.tokens_per_frame, sampling=sampling,
        system_prompt=system_prompt, time_instruction=time_instruction,
    )  # fmt: skip


def write_settings(folder: Path, config: ModelConfig, processor: Processor) -> None:
    """Writes config.json and processor.json."""
    write_json(folder / CONFIG_FILE, to_dict(config))
    write_json(folder / PROCESSOR_FILE, to_dict(processor))


def load_model_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of a MODEL folder. Raises a `UserError` that names file and field."""
    check_model_folder(folder)
    path = Path(folder) / CONFIG_FILE
    return from_dict(ModelConfig, read_json(path), source=path)


def load_processor(folder: str | Path) -> Processor:
    """The `Processor` of a MODEL folder. Raises a `UserError` that names file and field."""
    check_model_folder(folder)
    path = Path(folder) / PROCESSOR_FILE
    return processor_from_dict(read_json(path), source=path)


def processor_from_dict(described: object, *, source: str | Path) -> Processor:
    """The `Processor` of a JSON object, of `source` in messages. Raises a `UserError` that names the field.

    Objects from before a field was there mean its default.
    """
    if isinstance(described, Mapping):
        described = {"end_tokens": END_TOKENS, "generation": to_dict(Generation()), **described}
    return from_dict(Processor, described, source=source)
