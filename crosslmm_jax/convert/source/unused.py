"""Fields of a config.json that a conversion does not use."""

from collections.abc import Iterator
from pathlib import Path

from crosslmm_jax.convert.source.checks import Json
from crosslmm_jax.model_folder import read_json

# Parts of a config.json that are read too, unless the other tower of the checkpoint is not converted.
_PARTS = ("text_config", "vision_config")
# What `config` and `rope` read or check.
_USED = {
    "add_time_instruction", "head_dim", "hidden_act", "hidden_size", "image_size", "intermediate_size",
    "layer_norm_eps", "layer_types", "max_position_embeddings", "mm_hidden_size", "mm_projector_type",
    "mm_vision_tower", "model_type", "multimodal_projector_bias", "num_attention_heads", "num_channels",
    "num_hidden_layers", "num_key_value_heads", "patch_size", "projector_hidden_act", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "use_sliding_window",
    "vision_feature_layer", "vision_feature_select_strategy", "vocab_size",
}  # fmt: skip
# What has no effect on a trained model: who wrote the file, how the weights were made, and settings of parts
# that are not converted.
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "image_token_id", "image_token_index",
    "initializer_factor", "initializer_range", "is_encoder_decoder", "label2id", "max_window_layers",
    "pad_token_id", "return_dict", "sliding_window", "torch_dtype", "transformers_version", "use_cache",
    "video_token_id", "video_token_index", "vision_use_head",
}  # fmt: skip


def unused_fields(folder: Path) -> list[str]:
    """Names of the fields of `folder`'s config.json that say something which the conversion does not use."""
    path = folder / "config.json"
    if not path.is_file():  # beside big_vision's .npz
        return []
    config = read_json(path)
    return sorted(_unused(config, two_towers=config.get("model_type") == "siglip"))


def _unused(config: Json, *, two_towers: bool) -> Iterator[str]:
    for name, value in config.items():
        if name in _PARTS and isinstance(value, dict):
            if not (two_towers and name == "text_config"):
                yield from (f"{name}.{inner}" for inner in _unused(value, two_towers=False))
        elif value not in (None, False, [], {}) and name not in _USED | _WITHOUT_EFFECT:
            yield name
