"""What a stage trains: parameters split by part, and the model's graph (paper sec. 4.1)."""

import dataclasses
from collections.abc import Collection, Mapping

from jaxtyping import PyTree

from crosslmm_jax.config import PARTS, ModelConfig, StageConfig
from crosslmm_jax.model import Params


def split(params: Mapping[str, PyTree], trainable: Collection[str]) -> tuple[Params, Params]:
    """Splits `params` by part into (trainable, frozen).

    Raises:
      ValueError: a part is missing or unknown in `params`, or unknown in `trainable`.
    """
    if set(params) != set(PARTS) or not set(trainable) <= set(PARTS):
        raise ValueError(
            f"parameters have parts {sorted(params)} and {sorted(trainable)} are to be trained;"
            f" parts are {sorted(PARTS)}"
        )
    learning: Params = {part: params[part] for part in PARTS if part in trainable}
    frozen: Params = {part: params[part] for part in PARTS if part not in trainable}
    return learning, frozen


def merge(trainable: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> Params:
    """The inverse of `split`.

    Raises:
      ValueError: a part is missing, unknown, or in both.
    """
    parts = {**trainable, **frozen}
    if len(parts) != len(trainable) + len(frozen) or set(parts) != set(PARTS):
        raise ValueError(f"parts {sorted(trainable)} and {sorted(frozen)} do not make up {sorted(PARTS)}")
    return {part: parts[part] for part in PARTS}


def model_of_stage(model: ModelConfig, stage: StageConfig) -> ModelConfig:
    """`model` with only those directions of cross-attention in its graph that the stage uses."""
    cross = dataclasses.replace(model.cross_attention, directions=stage.directions)
    return dataclasses.replace(model, cross_attention=cross)
