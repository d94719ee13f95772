"""What a stage trains: the parameters split by part, and the model's graph (paper sec. 4.1)."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from crosslmm_jax.config import PARTS, ModelConfig, StageConfig

Params = Mapping[str, Any]


def split(params: Params, trainable: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`params` as (trainable, frozen), by top-level part; every part is in exactly one of the two.

    Raises:
      ValueError: `params` lacks a part or has one that is unknown, or `trainable` names an unknown part.
    """
    if set(params) != set(PARTS) or not set(trainable) <= set(PARTS):
        raise ValueError(
            f"parameters have parts {sorted(params)} and {sorted(trainable)} are to be trained;"
            f" parts are {sorted(PARTS)}"
        )
    learning = {part: params[part] for part in PARTS if part in trainable}
    frozen = {part: params[part] for part in PARTS if part not in trainable}
    return learning, frozen


def merge(trainable: Params, frozen: Params) -> dict[str, Any]:
    """What `split` took apart."""
    parts = {**trainable, **frozen}
    if len(parts) != len(trainable) + len(frozen) or set(parts) != set(PARTS):
        raise ValueError(f"parts {sorted(trainable)} and {sorted(frozen)} do not make up {sorted(PARTS)}")
    return {part: parts[part] for part in PARTS}


def model_of_stage(model: ModelConfig, stage: StageConfig) -> ModelConfig:
    """`model` with the directions of cross-attention that the stage has in its graph."""
    cross = dataclasses.replace(model.cross_attention, directions=stage.directions)
    return dataclasses.replace(model, cross_attention=cross)
