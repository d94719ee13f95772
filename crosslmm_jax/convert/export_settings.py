"""The settings files of an export, as Hugging Face reads them; and ours, read back from them."""

import operator
from collections.abc import Mapping
from pathlib import Path

from crosslmm_jax.config import ModelConfig, names_with_role
from crosslmm_jax.config_io import from_dict, to_dict
from crosslmm_jax.convert.source.checks import Json
from crosslmm_jax.convert.source.config import export_sizes
from crosslmm_jax.convert.source.processor import RESAMPLING
from crosslmm_jax.convert.source.rope import rope_scaling_of
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import Processor, processor_from_dict, read_json

# What config.json of a `SiglipVisionModel` does not have of the architecture; and what else must agree.
_NOT_DESCRIBED = {"vision.image_mean", "vision.image_std", "vision.num_layers"}
_FURTHER_SIZES = ("vision.depth", "decoder.vocab_size", "decoder.yarn_factor")
_PIL_NUMBER = {name: number for number, name in RESAMPLING.items()}


def vision_config(config: ModelConfig, dtype: str) -> Json:
    """config.json of a `SiglipVisionModel` whose last layer is the one that features are read from."""
    vision = config.vision
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "vision_feature_layer": -1,  # not a field of the class: tells `from-hf` that this is the last layer
        "torch_dtype": dtype,
    }


def text_config(config: ModelConfig, dtype: str, tokens: Mapping[str, int]) -> Json:
    """config.json of a `Qwen2ForCausalLM`."""
    decoder = config.decoder
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "vocab_size": decoder.vocab_size,
        "max_position_embeddings": decoder.max_positions,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": rope_scaling_of(decoder.yarn_factor, decoder.yarn_trained_positions),
        "tie_word_embeddings": decoder.tie_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        "bos_token_id": tokens.get("<|endoftext|>"),
        "eos_token_id": tokens.get("<|im_end|>"),
        "torch_dtype": dtype,
    }


def crosslmm_config(config: ModelConfig, processor: Processor, vision: Json, text: Json) -> Json:
    """config.json of the whole model: both parts as Hugging Face has them, our config under "crosslmm"."""
    return {
        "architectures": ["CrossLMM"],
        "model_type": "crosslmm",
        "vision_config": vision,
        "text_config": text,
        "crosslmm": to_dict(config),
        "processor": to_dict(processor),
    }


def export_folder(path: str | Path) -> Path:
    """The folder with all weights of an export, given the export's folder or that folder itself."""
    inner = Path(path) / "crosslmm"
    return inner if inner.is_dir() else Path(path)


def read_crosslmm_config(folder: Path) -> tuple[ModelConfig, Processor]:
    """Reads what `crosslmm_config` wrote. Raises a `UserError` that names file and field."""
    path = folder / "config.json"
    described = read_json(path)
    kind = described.get("model_type")
    if kind != "crosslmm":
        raise UserError(
            f"{path}: field model_type is {kind!r}; give --crosslmm the folder that `crosslmm convert to-hf`"
            " wrote, other checkpoints are --vision, --llm or --llava"
        )
    config = from_dict(ModelConfig, described.get("crosslmm"), source=f"{path}: field crosslmm")
    _check_parts(config, described, path)
    return config, processor_from_dict(described.get("processor"), source=f"{path}: field processor")


def _check_parts(config: ModelConfig, described: Json, path: Path) -> None:
    """Raises a `UserError` when the descriptions for Hugging Face were changed and `config` was not."""
    parts = export_sizes(described, path)
    names = [*names_with_role(ModelConfig, "architecture"), *_FURTHER_SIZES]
    # Positions of YaRN may be fewer than its factor makes.
    names.append(
        "decoder.max_positions" if config.decoder.yarn_factor == 1 else "decoder.yarn_trained_positions"
    )
    different = []
    for name in names:
        found, stated = (operator.attrgetter(name)(sizes) for sizes in (parts, config))
        if name not in _NOT_DESCRIBED and found != stated:
            part = "vision_config" if name.startswith("vision.") else "text_config"
            different.append(f"{name} is {found} in {part} and {stated} in crosslmm")
    if different:
        raise UserError(f"{path}: {'; '.join(different)}; make them agree")


def preprocessor_config(processor: Processor) -> Json:
    """preprocessor_config.json of a `SiglipImageProcessor`."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": processor.image_size, "width": processor.image_size},
        "resample": _PIL_NUMBER[processor.resampling],
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "rescale_factor": 1 / 255,
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }


def generation_config(processor: Processor, tokens: Mapping[str, int], *, source: Path) -> Json:
    """generation_config.json: ends as our answers do, draws as the source said, pads with the end of a text.

    Args:
      processor: of the MODEL folder.
      tokens: all tokens of its tokenizer and their ids.
      source: the MODEL folder.

    Raises:
      UserError: the tokenizer lacks a token that ends an answer.
    """
    missing = [token for token in processor.end_tokens if token not in tokens]
    if missing:
        raise UserError(
            f"{source}/processor.json: field end_tokens names {', '.join(missing)}, which the tokenizer does"
            " not have; correct the field"
        )
    end, ends = tokens.get("<|endoftext|>"), [tokens[token] for token in processor.end_tokens]
    said = {name: value for name, value in to_dict(processor.generation).items() if value is not None}
    return {"bos_token_id": end, "pad_token_id": end, "eos_token_id": ends, "do_sample": False} | said
