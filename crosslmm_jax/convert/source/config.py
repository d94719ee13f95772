"""Sizes of other projects' checkpoints, from their config.json.

Hugging Face writes all sizes of a top-level config. In a nested one (`vision_config`, `text_config`) it omits
values that equal the class's default. So nested configs are completed by those classes, and a size that is
missing anywhere else is an error.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crosslmm_jax import presets
from crosslmm_jax.config import DecoderConfig, TimeInstruction, VisionConfig
from crosslmm_jax.convert.source.checks import Json, check_types
from crosslmm_jax.convert.source.rope import check_rope, positions_of
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import read_json

LLAVA_TYPES = ("llava_onevision", "llava", "llava_qwen")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NEEDED_VISION = (*_NEEDED, "image_size", "patch_size")
_NEEDED_TEXT = (*_NEEDED, "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "vocab_size")


class Sizes(NamedTuple):
    """Sizes of the two parts of a model, from its sources."""

    vision: VisionConfig
    decoder: DecoderConfig


def vision_sizes(folder: Path) -> VisionConfig:
    """Sizes of a SigLIP tower, from a vision-only or a two-tower folder."""
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind == "siglip":
        return _siglip(_nested(config, "vision_config", path), path, nested=True)
    if kind == "siglip_vision_model":
        return _siglip(config, path, nested=False)
    if kind in ("siglip2", "siglip2_vision_model"):
        raise UserError(
            f"{path}: field model_type is {kind!r}: SigLIP2's NaFlex tower, for pictures of any shape; give"
            " the fixed-resolution one, e.g. siglip2-so400m-patch14-384"
        )
    fix = "give it as --llm" if kind == "qwen2" else "give a SigLIP or SigLIP2 folder"
    raise UserError(f"{path}: field model_type is {kind!r}, which is no SigLIP vision tower; {fix}")


def decoder_sizes(folder: Path) -> DecoderConfig:
    """Sizes of a Qwen2 or Qwen2.5 causal language model."""
    path = folder / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind != "qwen2" or "mm_vision_tower" in config:
        fix = "give it as --vision" if str(kind).startswith("siglip") else (
            "give it as --llava" if kind in LLAVA_TYPES or kind == "qwen2" else "give a Qwen2 folder"
        )  # fmt: skip
        raise UserError(f"{path}: field model_type is {kind!r}, which is no Qwen2 language model; {fix}")
    return _qwen2(config, path, nested=False)


def llava_sizes(folder: Path, *, has_head: bool, tower: VisionConfig | None = None) -> Sizes:
    """Sizes of a LLaVA-OneVision or LLaVA-Video checkpoint, in any layout.

    Args:
      folder: the checkpoint.
      has_head: it holds an `lm_head.weight`. This decides where its two configs disagree about tying.
      tower: sizes of the vision tower. The original layout only names its tower; this is needed where it is
        not a released one.
    """
    path = folder / "config.json"
    config = read_json(path)
    check_types(config, path)
    if config.get("model_type") == "llava_onevision":
        return _hf_llava(config, path, has_head)
    if "mm_vision_tower" in config:
        return _original_llava(config, path, tower)
    kind = config.get("model_type")
    raise UserError(
        f"{path}: field model_type is {kind!r}, no LLaVA-OneVision or LLaVA-Video; give --vision and --llm"
    )


def export_sizes(config: Json, path: Path) -> Sizes:
    """Sizes of the two parts that `to-hf` describes in an export's config.json, which `path` names."""
    vision = _siglip(_nested(config, "vision_config", path), path, nested=False)
    return Sizes(vision, _qwen2(_nested(config, "text_config", path), path, nested=False))


def llava_time_instruction(folder: Path) -> TimeInstruction:
    """What a LLaVA checkpoint's training prompts said about the times of each video.

    LLaVA-NeXT's training writes `add_time_instruction` into config.json, and its inference reads it. The
    sentence lists the time of every frame: our "full". Hugging Face's layouts do not have the field.
    """
    path = folder / "config.json"
    config = read_json(path)
    check_types(config, path)
    return "full" if config.get("add_time_instruction") else "none"


def _hf_llava(config: Json, path: Path, has_head: bool) -> Sizes:
    vision = _siglip(_nested(config, "vision_config", path), path, nested=True)
    decoder = _qwen2(_nested(config, "text_config", path), path, nested=True)
    _expect(config, path, "projector_hidden_act", ("gelu",), default="gelu")
    _expect(config, path, "multimodal_projector_bias", (True,), default=True)
    # The class's default, "full", reads all patches; "default" would drop the first.
    _expect(config, path, "vision_feature_select_strategy", ("full",), default="full")
    layer = config.get("vision_feature_layer", -1)
    if layer is None:
        raise ConfigError(f"{path}: field vision_feature_layer is null; it must be one number")
    if layer >= 0:
        layer -= vision.num_layers + 1
    stated = {decoder.tie_embeddings, config.get("tie_word_embeddings", decoder.tie_embeddings)}
    tied = (False not in stated) if has_head else (True in stated)
    decoder = dataclasses.replace(decoder, tie_embeddings=tied, vocab_size=_unpadded(decoder.vocab_size))
    return Sizes(_replaced(vision, path, feature_layer=layer), decoder)


def _unpadded(rows: int) -> int:
    """Rows of the embedding of a released Qwen2, before Hugging Face's LLaVA added two and rounded up."""
    known = {presets.get_preset(name).decoder.vocab_size for name in ("crosslmm_2b", "crosslmm_7b")}
    return next((size for size in known if rows == -(-(size + 2) // 64) * 64), rows)


def _original_llava(config: Json, path: Path, tower: VisionConfig | None) -> Sizes:
    _expect(config, path, "mm_projector_type", ("mlp2x_gelu",))
    name = str(config["mm_vision_tower"])
    if tower is None:
        tower = _released_tower(name)
    if tower is None:
        raise UserError(
            f"{path}: field mm_vision_tower is {name!r}, whose sizes are unknown; add --vision with it"
        )
    width = config.get("mm_hidden_size")
    if width != tower.width:
        raise UserError(
            f"{path}: field mm_hidden_size is {width}, but the tower {name!r} is {tower.width} wide"
        )
    # LLaVA builds the tower without its last layer and reads the output of the one below.
    vision = _replaced(tower, path, num_layers=tower.num_layers - 1, feature_layer=-1)
    return Sizes(vision, _qwen2(config, path, nested=False))


def _released_tower(name: str) -> VisionConfig | None:
    base = name.rstrip("/").split("/")[-1]
    if re.fullmatch(r"siglip2?-so400m-patch14-384", base):
        return presets.so400m()
    return presets.giant_opt() if base == "siglip2-giant-opt-patch16-384" else None


def _nested(config: Json, name: str, path: Path) -> Json:
    value = config.get(name)
    if not isinstance(value, dict):
        found = "missing" if value is None else f"{value!r} instead of an object"
        raise ConfigError(f"{path}: field {name} is {found}; download the config.json again")
    return value


def _completed(cls: Any, config: Json, path: Path) -> Json:
    """A nested config with the defaults of the Hugging Face class `cls`."""
    check_types(config, path)
    try:
        return cls(**config).to_dict()
    except Exception as error:  # the class raises errors of its own types
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: {cls.__name__} rejects its fields ({reason}); fix them") from error


def _check_stated(config: Json, path: Path, names: tuple[str, ...]) -> None:
    missing = [name for name in names if config.get(name) is None]
    if missing:
        raise ConfigError(f"{path}: field {', '.join(missing)} is missing; add it as the model was trained")
    check_types(config, path)


def _expect(
    config: Json, path: Path, name: str, known: tuple[object, ...], *, default: object = None
) -> None:
    value = config.get(name, default)
    if value not in known:
        choices = " or ".join(repr(choice) for choice in known)
        raise ConfigError(f"{path}: field {name} is {value!r}; only {choices} can be converted")


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Adds the file to the errors of our config classes."""
    try:
        yield
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _replaced(vision: VisionConfig, path: Path, **fields: int) -> VisionConfig:
    with _errors_name(path):
        return dataclasses.replace(vision, **fields)


def _siglip(config: Json, path: Path, *, nested: bool) -> VisionConfig:
    if nested:
        _expect(config, path, "model_type", ("siglip_vision_model", "siglip"), default="siglip_vision_model")
        from transformers import SiglipVisionConfig

        config = _completed(SiglipVisionConfig, config, path)
    _check_stated(config, path, _NEEDED_VISION)
    _expect(config, path, "hidden_act", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    _expect(config, path, "num_channels", (3,), default=3)
    extra = {}
    if "vision_feature_layer" in config:  # our export holds only the layers that are run, and says so
        extra["feature_layer"] = config["vision_feature_layer"]
    with _errors_name(path):
        return VisionConfig(
            image_size=config["image_size"], patch_size=config["patch_size"], width=config["hidden_size"],
            num_layers=config["num_hidden_layers"], num_heads=config["num_attention_heads"],
            mlp_width=config["intermediate_size"], layer_norm_eps=config.get("layer_norm_eps", 1e-6), **extra,
        )  # fmt: skip


def _qwen2(config: Json, path: Path, *, nested: bool) -> DecoderConfig:
    if nested:
        _expect(config, path, "model_type", ("qwen2",), default="qwen2")
        check_rope(config, path)  # the class would settle what the config leaves open
        from transformers import Qwen2Config

        config = _completed(Qwen2Config, config, path)
    _check_stated(config, path, _NEEDED_TEXT)
    _expect(config, path, "hidden_act", ("silu",), default="silu")
    _expect(config, path, "use_sliding_window", (False,), default=False)
    kinds = config.get("layer_types") or ()
    if not isinstance(kinds, list | tuple) or any(kind != "full_attention" for kind in kinds):
        raise ConfigError(f"{path}: field layer_types is {kinds!r}; only full_attention can be converted")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    positions = positions_of(config, path)
    with _errors_name(path):
        return DecoderConfig(
            vocab_size=config["vocab_size"], width=width, num_layers=config["num_hidden_layers"],
            num_heads=heads, num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or width // (heads or 1), mlp_width=config["intermediate_size"],
            rms_norm_eps=config["rms_norm_eps"],
            tie_embeddings=config.get("tie_word_embeddings", False),
            **positions._asdict(),
        )  # fmt: skip
