"""Types of the fields of a config.json, checked before anything computes with them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosslmm_jax.errors import ConfigError

Json = Mapping[str, Any]  # a config.json, or an object in it
_COUNTS = (
    "head_dim", "hidden_size", "image_size", "intermediate_size", "max_position_embeddings", "mm_hidden_size",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "original_max_position_embeddings",
    "patch_size", "vision_feature_layer", "vocab_size",
)  # fmt: skip
_NUMBERS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "layer_norm_eps", "partial_rotary_factor",
    "rms_norm_eps", "rope_theta",
)  # fmt: skip
_FLAGS = ("add_time_instruction", "tie_word_embeddings", "truncate")
_LARGEST = 2**31  # of any size


def check_types(config: Json, path: Path) -> None:
    """Raises a `ConfigError` that lists all fields that are present with a wrong type."""
    wrong = []
    for names, fits, expected in (
        (_COUNTS, _is_count, f"a whole number of at most {_LARGEST}"),
        (_NUMBERS, is_number, "a number"),
        (_FLAGS, _is_flag, "true or false"),
    ):
        for name in names:
            value = config.get(name)
            if value is not None and not fits(value):
                wrong.append(f"field {name} is {value!r}; it must be {expected}")
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}")


def _is_count(value: object) -> bool:
    return type(value) is int and abs(value) <= _LARGEST


def is_number(value: object) -> bool:
    """Whether `value`, from JSON, is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # not NaN


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)
