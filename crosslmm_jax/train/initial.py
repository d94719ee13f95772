"""Checks that the MODEL folder of `run.init_from` is the model of the run's config.

Shapes are checked when weights are read. These checks cover what shapes do not show: constants that the
weights were trained with, the layers they belong to, and how frames were read.
"""

import logging
import operator
from pathlib import Path

from crosslmm_jax.config import DataConfig, ModelConfig, names_with_role
from crosslmm_jax.config_io import option_of
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model_folder import CONFIG_FILE, PROCESSOR_FILE, load_model_config, load_processor

logger = logging.getLogger(__name__)

# Initialisation of cross-attention.
_INITIALISATION = ("cross_attention.gate_init", "cross_attention.cross_attn_init")
# Fields of which only the resulting layers are compared: `vision.depth` and `cross_attention_layers`.
_LAYERS = {
    "vision.num_layers", "vision.feature_layer",
    "cross_attention.cross_attn_every", "cross_attention.cross_attn_offset",
}  # fmt: skip


def check_same_model(folder: str | Path, config: ModelConfig) -> None:
    """Raises a `ConfigError` that lists the fields in which the MODEL `folder` and the run's `config` differ.

    Compares fields with role "architecture" or "identity". A stage may change the others: token merge,
    directions, scopes, positions, numerics.
    """
    path = Path(folder) / CONFIG_FILE
    theirs, ours = _bound_to_weights(load_model_config(folder)), _bound_to_weights(config)
    different = [
        f"{name} is {theirs[name]}, in model of the run it is {ours[name]}"
        for name in ours
        if name not in _INITIALISATION and theirs[name] != ours[name]
    ]
    if different:
        raise ConfigError(
            f"run.init_from {path}: {'; '.join(different)}; set the run's model to what the weights were"
            " trained with, or start from another folder"
        )
    for name in _INITIALISATION:
        value, wanted = theirs[name], ours[name]
        if value != wanted:
            raise ConfigError(
                f"run.init_from {path}: {name} is {value}, in model of the run it is {wanted}; existing"
                f" weights keep their initial values: set model.{name} to {value}, or make the folder with"
                f" `crosslmm convert from-hf ... {option_of(name)} {wanted}`"
            )


def warn_of_other_inputs(folder: str | Path, data: DataConfig) -> None:
    """Warns when the MODEL `folder` was trained with other frame resizing or time instructions than the run.

    A run may change them, and the MODEL folder that it writes has the new values. A default value in `folder`
    causes no warning, because perhaps nobody chose it.
    """
    processor = vars(load_processor(folder))
    for name in names_with_role(DataConfig, "identity"):
        ours = getattr(data, name)
        value = processor.get(name, ours)
        if value not in (ours, getattr(DataConfig, name, None)):
            logger.warning(
                "run.init_from %s: %s is %s, DataConfig.%s of the run is %s; set it to %s to train as the"
                " weights were trained", Path(folder) / PROCESSOR_FILE, name, value, name, ours, value,
            )  # fmt: skip


def warn_of_other_positions(folder: str | Path, config: ModelConfig) -> None:
    """Warns when the MODEL `folder` has YaRN and the run has another, or none."""
    theirs, ours = load_model_config(folder).decoder, config.decoder
    names = ("yarn_factor", "yarn_trained_positions")
    if theirs.yarn_factor == 1 or all(getattr(theirs, name) == getattr(ours, name) for name in names):
        return
    logger.warning(
        "run.init_from %s: decoder has yarn_factor %g of %d positions, the run %g of %d; set"
        " --model.decoder.yarn-factor and --model.decoder.yarn-trained-positions to train as the weights were"
        " trained", Path(folder) / CONFIG_FILE, theirs.yarn_factor, theirs.yarn_trained_positions,
        ours.yarn_factor, ours.yarn_trained_positions,
    )  # fmt: skip


def _bound_to_weights(config: ModelConfig) -> dict[str, object]:
    """Field -> value of all fields that the weights depend on."""
    names = names_with_role(ModelConfig, "architecture", "identity")
    values = {name: operator.attrgetter(name)(config) for name in names if name not in _LAYERS}
    layers = {"vision.depth": config.vision.depth, "cross_attention_layers": config.cross_attention_layers}
    return values | layers
