"""Checks that the MODEL folder of `run.init_from` is the model of the run's config.

Shapes are checked when weights are read. These checks cover what shapes do not show: constants that the
weights were trained with, the layers they belong to, and how frames were read.
"""

import logging
from pathlib import Path

from crosslmm_jax.config import DataConfig, ModelConfig
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model_folder import CONFIG_FILE, PROCESSOR_FILE, load_model_config, load_processor

logger = logging.getLogger(__name__)

_VISION = (
    "image_size", "patch_size", "width", "depth", "num_heads", "mlp_width", "layer_norm_eps", "image_mean",
    "image_std", "post_layernorm",
)  # fmt: skip
_DECODER = (
    "vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "rope_theta",
    "rms_norm_eps", "tie_embeddings",
)  # fmt: skip
# Initialisation of cross-attention.
_INITIALISATION = ("gate_init", "cross_attn_init")


def check_same_model(folder: str | Path, config: ModelConfig) -> None:
    """Raises a `ConfigError` that lists the fields in which the MODEL `folder` and the run's `config` differ.

    Fields that a stage may change are not compared: token merge, directions, scopes, positions, numerics.
    """
    path, stored = Path(folder) / CONFIG_FILE, load_model_config(folder)
    theirs, ours = _bound_to_weights(stored), _bound_to_weights(config)
    different = [
        f"{name} is {theirs[name]}, in model of the run it is {ours[name]}"
        for name in ours
        if theirs[name] != ours[name]
    ]
    if different:
        raise ConfigError(
            f"run.init_from {path}: {'; '.join(different)}; set the run's model to what the weights were"
            " trained with, or start from another folder"
        )
    for name in _INITIALISATION:
        value, wanted = getattr(stored.cross_attention, name), getattr(config.cross_attention, name)
        if value != wanted:
            raise ConfigError(
                f"run.init_from {path}: cross_attention.{name} is {value}, in model of the run it is"
                f" {wanted}; existing weights keep their initial values: set"
                f" model.cross_attention.{name} to {value}, or make the folder with"
                f" `crosslmm convert from-hf ... --cross-attention.{name.replace('_', '-')} {wanted}`"
            )


def warn_of_other_inputs(folder: str | Path, data: DataConfig) -> None:
    """Warns when the MODEL `folder` was trained with other frame resizing or time instructions than the run.

    A run may change them, and the MODEL folder that it writes has the new values. A default value in `folder`
    causes no warning, because perhaps nobody chose it.
    """
    theirs = load_processor(folder)
    for name, default in (("resampling", "bicubic"), ("time_instruction", "none")):
        value, ours = getattr(theirs, name), getattr(data, name)
        if value not in (default, ours):
            logger.warning(
                "run.init_from %s: %s is %s, DataConfig.%s of the run is %s; set it to %s to train as the"
                " weights were trained", Path(folder) / PROCESSOR_FILE, name, value, name, ours, value,
            )  # fmt: skip


def _bound_to_weights(config: ModelConfig) -> dict[str, object]:
    """Field -> value of all fields that the weights depend on."""
    values = {f"vision.{name}": getattr(config.vision, name) for name in _VISION}
    values |= {f"decoder.{name}": getattr(config.decoder, name) for name in _DECODER}
    values["cross_attention.kv_source"] = config.cross_attention.kv_source
    return values | {"cross_attention_layers": config.cross_attention_layers}
