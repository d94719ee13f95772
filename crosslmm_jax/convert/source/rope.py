"""Rotary positions of a Qwen2 config.json."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from crosslmm_jax.config import DecoderConfig
from crosslmm_jax.convert.source.checks import Json, check_types
from crosslmm_jax.errors import ConfigError

_FIELDS = ("rope_parameters", "rope_scaling")
_KINDS = ("rope_type", "type")  # names of the same field, new and old


class Positions(NamedTuple):
    """The fields of `DecoderConfig` that say how positions are rotated, and how many there are."""

    rope_theta: float
    max_positions: int
    yarn_factor: float = DecoderConfig.yarn_factor
    yarn_trained_positions: int = DecoderConfig.yarn_trained_positions


def check_rope(config: Json, path: Path) -> Json:
    """The one object about rotary positions in a config.json, or an empty one.

    transformers prefers `rope_scaling` to `rope_parameters`, and either to the field `rope_theta`. Where they
    differ, nobody knows which of them the weights were trained with.

    Raises:
      ConfigError: two fields differ, or positions are changed in a way that the decoder does not know.
    """
    check_types(config, path)
    given = {name: config[name] for name in _FIELDS if config.get(name)}
    for name, rope in given.items():
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{path}: field {name} is {rope!r}; it must be an object")
        check_types(rope, path)
        _check_known(name, rope, path)
    outer = config.get("rope_theta")
    completed = {name: _completed(rope, outer) for name, rope in given.items()}
    thetas = {f"{name}.rope_theta": rope["rope_theta"] for name, rope in completed.items()}
    thetas |= {} if outer is None else {"rope_theta": outer}
    if len(set(thetas.values())) > 1:
        listed = ", ".join(f"{name} {theta!r}" for name, theta in thetas.items())
        raise ConfigError(f"{path}: {listed} differ; keep the one that the model was trained with")
    first, *further = completed.values() or [{}]
    if any(rope != first for rope in further):
        raise ConfigError(
            f"{path}: fields {' and '.join(given)} differ; keep the one that the model was trained with"
        )
    return first


def _completed(rope: Json, outer_theta: float | None) -> Json:
    """`rope` with one name for its kind, without fields that are null, and with the base of the config."""
    stated = {name: value for name, value in rope.items() if value is not None and name not in _KINDS}
    kinds = [rope[name] for name in _KINDS if rope.get(name) is not None]
    return {"rope_theta": outer_theta, "rope_type": [*kinds, "default"][0], **stated}


def _check_known(name: str, rope: Json, path: Path) -> None:
    """Raises a `ConfigError` for positions that are neither plain nor YaRN with Qwen2.5's constants."""
    kinds = [rope[field] for field in _KINDS if rope.get(field) is not None] or ["default"]
    fixed: dict[str, float] = {"partial_rotary_factor": 1}
    if all(kind == "yarn" for kind in kinds):
        factor = rope.get("factor")
        if factor is None or factor < 1:
            raise ConfigError(f"{path}: field {name}.factor is {factor!r}; YaRN needs a number of 1 or more")
        fixed |= {"attention_factor": 0.1 * math.log(factor) + 1, "beta_fast": 32, "beta_slow": 1}
        fixed |= {"truncate": True}
        free = ("rope_theta", "factor", "original_max_position_embeddings")
    elif all(kind == "default" for kind in kinds):
        free = ("rope_theta",)
    else:
        listed = " and ".join(map(repr, kinds))
        raise ConfigError(
            f"{path}: field {name} scales rotary positions by {listed}; only YaRN and unscaled ones can be"
            " converted"
        )
    for field, value in rope.items():
        if value is None or field in (*_KINDS, *free):
            continue
        if field not in fixed:
            raise ConfigError(f"{path}: field {name}.{field} is {value!r}; the decoder has no such constant")
        if not math.isclose(value, fixed[field], rel_tol=1e-6):
            only = json.dumps(fixed[field])
            raise ConfigError(f"{path}: field {name}.{field} is {value!r}; only {only} can be converted")


def positions_of(config: Json, path: Path) -> Positions:
    """How the positions of a config.json are rotated, as transformers reads it.

    YaRN without `original_max_position_embeddings` extends `max_position_embeddings`. Qwen2.5's documentation
    adds YaRN without changing the latter, so the decoder has the positions that YaRN makes.
    """
    rope = check_rope(config, path)
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{path}: field rope_theta is missing; add it as the model was trained")
    stated = config["max_position_embeddings"]
    if rope.get("rope_type") != "yarn":
        return Positions(float(theta), stated)
    trained = rope.get("original_max_position_embeddings", stated)
    reached = stated if stated > trained else int(rope["factor"] * trained)
    return Positions(float(theta), reached, float(rope["factor"]), trained)


def rope_scaling_of(factor: float, trained_positions: int) -> Json | None:
    """The field `rope_scaling` of an export; None for positions as they were trained."""
    if factor == 1:
        return None
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained_positions}
