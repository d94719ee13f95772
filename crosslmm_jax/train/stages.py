"""What a stage trains: parameters split by name, and the model's graph (paper sec. 4.1).

`StageConfig.trainable` and `frozen` are patterns of parameter names, as a MODEL folder has them:

    decoder                 a part, and everything in it
    decoder.layers.w*       the matrices of all decoder layers (`*` matches anything, dots included)
    *.gate                  the gates of V2V and T2V
    decoder.layers.*_norm   its norms; `?` and `[abc]` match one character

A pattern names what it matches, and what lies below. What `trainable` names and `frozen` does not, learns.
The layers of a stack are one parameter: they learn or stay together.

`StageConfig.lora` adds adapters to matrices that do not learn. They are trainable parameters under "lora".
"""

import collections
import dataclasses
import difflib
import fnmatch
import functools
import math
from collections.abc import Collection, Mapping, Sequence

import jax
from jaxtyping import Array, PyTree

from crosslmm_jax.config import PARTS, ModelConfig, StageConfig
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model import Adapted, Params, adapted_matrices, adapter_axes, init_adapters
from crosslmm_jax.model_folder import flatten, parameter_shapes, unflatten

ADAPTERS = "lora"  # their key among the trainable parameters


def trained_names(names: Collection[str], stage: StageConfig) -> set[str]:
    """Those of the parameter `names`, such as "decoder.layers.wq", that a stage trains.

    Raises:
      ConfigError: a pattern matches nothing, nothing is left to train, or a direction of cross-attention
        would learn that is not in the graph.
    """
    named = matching(stage.trainable, names, field="trainable", what="parameter of the model")
    frozen = matching(stage.frozen, named, field="frozen", what="parameter that StageConfig.trainable names")
    found = named - frozen
    if not found and not stage.lora.rank:
        raise ConfigError(
            f"StageConfig.frozen is {stage.frozen!r}; it must leave some of what trainable names to learn"
        )
    for part in _not_in_graph(found, stage):
        raise ConfigError(
            f"StageConfig.trainable is {stage.trainable!r}, which names parameters of {part}; directions is"
            f" {stage.directions!r}, so that they would not learn: add {part!r} to directions or to frozen"
        )
    return found


def adapted_names(model: ModelConfig, stage: StageConfig) -> set[str]:
    """Names of the matrices of `model` that get an adapter in a stage.

    Raises:
      ConfigError: a pattern matches no such matrix, a matrix would learn itself, or a direction of
        cross-attention is not in the graph.
    """
    if not stage.lora.rank:
        return set()
    matrices, targets = adapted_matrices(model), stage.lora.targets
    found = matching(targets, matrices, field="lora.targets", what="matrix of decoder.layers, v2v or t2v")
    for part in _not_in_graph(found, stage):
        raise ConfigError(
            f"StageConfig.lora.targets is {targets!r}, which names matrices of {part}; directions is"
            f" {stage.directions!r}, so that their adapters would not learn: add {part!r} to directions, or"
            " name other targets"
        )
    if twice := sorted(found & trained_names(parameter_shapes(model), stage)):
        raise ConfigError(
            f"StageConfig.lora.targets names {', '.join(twice[:4])}, which StageConfig.trainable names too;"
            " an adapter is for a matrix that does not learn: take them out of one of the two"
        )
    return found


def _not_in_graph(names: Collection[str], stage: StageConfig) -> list[str]:
    """Directions of cross-attention that have one of `names` and are not in the graph of the stage."""
    return sorted(_parts(names) & ({"v2v", "t2v"} - set(stage.directions)))


def matching(patterns: Sequence[str], names: Collection[str], *, field: str, what: str) -> set[str]:
    """Those of the parameter `names` that one of the patterns matches.

    Args:
      patterns: as at the top of this file.
      names: of parameters.
      field: of `StageConfig` that holds the patterns, for the message.
      what: what `names` are, for the message.

    Raises:
      ConfigError: a pattern matches none of them; the message has the nearest names.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {
            name for name in names if any(fnmatch.fnmatchcase(n, pattern) for n in _with_parents(name))
        }
        if not matched:
            nodes = sorted({node for name in names for node in _with_parents(name)})
            near = difflib.get_close_matches(pattern, nodes, n=3, cutoff=0.5) or nodes[:3]
            raise ConfigError(
                f"StageConfig.{field}: {pattern!r} matches no {what}; near it are {', '.join(near)}"
            )
        found |= matched
    return found


def _with_parents(name: str) -> list[str]:
    """The name itself after those of all that it lies in: "a", "a.b" and "a.b.c" of "a.b.c"."""
    keys = name.split(".")
    return [".".join(keys[: count + 1]) for count in range(len(keys))]


def split(params: Mapping[str, PyTree], stage: StageConfig) -> tuple[Params, Params]:
    """Splits `params` by name into (trainable, frozen), both nested like `params`.

    Raises:
      ValueError: `params` have other parts than a model.
      ConfigError: as `trained_names`.
    """
    if set(params) != set(PARTS):
        raise ValueError(f"parameters have parts {sorted(params)}; parts are {sorted(PARTS)}")
    flat = flatten(params)
    learning = trained_names(flat, stage)
    trainable = {name: value for name, value in flat.items() if name in learning}
    frozen = {name: value for name, value in flat.items() if name not in learning}
    return unflatten(trainable), unflatten(frozen)


def merge(trainable: Mapping[str, PyTree], frozen: Mapping[str, PyTree]) -> Params:
    """The inverse of `split`, with an `Adapted` matrix for each that has an adapter.

    Raises:
      ValueError: a parameter is in both, or a part is missing or unknown.
    """
    adapters = flatten(trainable.get(ADAPTERS, {}))
    learning = flatten({part: value for part, value in trainable.items() if part != ADAPTERS})
    params = {**learning, **flatten(frozen)}
    if len(params) != len(learning) + len(flatten(frozen)) or _parts(params) != set(PARTS):
        raise ValueError(f"parts {sorted(trainable)} and {sorted(frozen)} do not make up {sorted(PARTS)}")
    return unflatten(params | {name: Adapted(params[name], low) for name, low in adapters.items()})


def _parts(names: Collection[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def new_adapters(model: ModelConfig, stage: StageConfig, key: Array) -> Params:
    """What `split` gives as trainable, for the adapters: {} without LoRA."""
    lora, names = stage.lora, adapted_names(model, stage)
    if not names:
        return {}
    scale = lora.alpha / lora.rank
    return {ADAPTERS: unflatten(init_adapters(model, names, key, rank=lora.rank, scale=scale))}


def axes_of_adapters(model: ModelConfig, stage: StageConfig) -> Params:
    """The logical axes of every array of `new_adapters`."""
    lora, names = stage.lora, adapted_names(model, stage)
    if not names:
        return {}
    scale = lora.alpha / lora.rank
    return {ADAPTERS: unflatten(adapter_axes(model, names, rank=lora.rank, scale=scale))}


@functools.lru_cache(maxsize=8)
def trained_of_model(model: ModelConfig, stage: StageConfig) -> frozenset[str]:
    """Names of the parameters that a stage trains, those of adapters with "lora." in front.

    Raises like `trained_names` and `adapted_names`.
    """
    adapters = {f"{ADAPTERS}.{name}" for name in adapted_names(model, stage)}
    return frozenset(trained_names(parameter_shapes(model), stage) | adapters)


def trained_shares(model: ModelConfig, stage: StageConfig) -> dict[str, float]:
    """Part -> share of its parameters that a stage trains, for parts of which it trains some."""
    learning = trained_of_model(model, stage)
    sizes: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, shape in parameter_shapes(model).items():
        size = math.prod(shape)
        of_part = sizes[name.split(".")[0]]
        of_part[0] += size * (name in learning)
        of_part[1] += size
    return {part: trained / total for part, (trained, total) in sizes.items() if trained}


def adapter_sizes(model: ModelConfig, stage: StageConfig) -> dict[str, int]:
    """Name of each adapted matrix -> parameters of its adapters in all layers."""
    shapes = jax.eval_shape(lambda key: new_adapters(model, stage, key), jax.random.key(0))
    adapters = flatten(shapes.get(ADAPTERS, {}))
    return {name: low.a.size + low.b.size for name, low in adapters.items()}


def model_of_stage(model: ModelConfig, stage: StageConfig) -> ModelConfig:
    """`model` with only those directions of cross-attention in its graph that the stage uses."""
    cross = dataclasses.replace(model.cross_attention, directions=stage.directions)
    return dataclasses.replace(model, cross_attention=cross)
