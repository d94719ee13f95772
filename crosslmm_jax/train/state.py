"""`TrainState`: everything that a step changes, as one pytree, and how it is made and sharded."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int, PyTree

from crosslmm_jax.config import ModelConfig, StageConfig
from crosslmm_jax.model import Params, cast, init_params, logical_axes, without_adapters
from crosslmm_jax.parallel import param_shardings, replicated
from crosslmm_jax.train.optimizer import make_optimizer
from crosslmm_jax.train.stages import axes_of_adapters, merge, new_adapters, split

_KEY_OF_ADAPTERS = 1  # folded into the key of the parameters


class TrainState(NamedTuple):
    """State of training after `step` updates; what learns and its moments are float32."""

    step: Int[Array, ""]
    trainable: PyTree[Array]  # a `Params` of what learns, and the adapters under "lora"
    frozen: PyTree[Array]  # the other parameters: no gradient, no moments; see `StageConfig.frozen_dtype`
    opt_state: PyTree[Array]  # of the trainable parameters

    @property
    def params(self) -> Params:
        """All parameters, as the model takes them."""
        return merge(self.trainable, self.frozen)


def initial_state(params: Params, config: ModelConfig, stage: StageConfig, key: Array) -> TrainState:
    """The state before the first step; `key` is for new adapters."""
    trainable, frozen = split(params, stage)
    trainable |= new_adapters(config, stage, jax.random.fold_in(key, _KEY_OF_ADAPTERS))
    frozen = cast(frozen, stage.frozen_dtype)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, make_optimizer(stage).init(trainable))


def abstract_state(config: ModelConfig, stage: StageConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shape, dtype and sharding of every array of the state, as `jax.ShapeDtypeStruct`.

    Nothing is allocated. Moments are sharded like their parameters.
    """
    shapes = jax.eval_shape(_new_state(config, stage), jax.random.key(0))
    params = param_shardings(logical_axes(config), without_adapters(shapes.params), mesh)
    trainable, frozen = split(params, stage)
    axes = axes_of_adapters(config, stage)
    trainable |= param_shardings(axes, {key: shapes.trainable[key] for key in axes}, mesh)
    moments = optax.tree_utils.tree_map_params(
        make_optimizer(stage),
        lambda _, sharding: sharding,
        shapes.opt_state,
        trainable,
        transform_non_params=lambda _: replicated(mesh),
    )
    shardings = TrainState(replicated(mesh), trainable, frozen, moments)  # type: ignore[arg-type]
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _new_state(config: ModelConfig, stage: StageConfig) -> Callable[[Array], TrainState]:
    return lambda key: initial_state(init_params(config, key), config, stage, key)


class StateBytes(NamedTuple):
    """Bytes on one device while a step runs, without activations."""

    trainable: int  # float32 parameters that learn, adapters included
    moments: int  # of the optimiser
    gradients: int  # float32, of what learns
    frozen: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def state_bytes_per_device(abstract: TrainState) -> StateBytes:
    """What a state takes on each device of its mesh. A `jax.sharding.AbstractMesh` needs no devices.

    Args:
      abstract: of `abstract_state`.
    """
    learning = _bytes_per_device(abstract.trainable)
    return StateBytes(
        trainable=learning, moments=_bytes_per_device(abstract.opt_state), gradients=learning,
        frozen=_bytes_per_device(abstract.frozen),
    )  # fmt: skip


def _bytes_per_device(abstract: PyTree[jax.ShapeDtypeStruct]) -> int:
    shards = ((leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(abstract))
    return sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in shards)


def shardings_of(abstract: PyTree[jax.ShapeDtypeStruct]) -> PyTree[jax.sharding.Sharding]:
    """The shardings in a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def random_state(config: ModelConfig, stage: StageConfig, mesh: Mesh, *, seed: int) -> TrainState:
    """A state with random parameters: the same values on any mesh, each shard made on its device."""
    make = jax.jit(
        _new_state(config, stage),
        out_shardings=shardings_of(abstract_state(config, stage, mesh)),
        compiler_options={"xla_backend_optimization_level": 1},  # runs once: compile it quickly
    )
    with jax.set_mesh(mesh):
        return make(jax.random.key(seed))


def state_of_params(
    params: Params, config: ModelConfig, stage: StageConfig, mesh: Mesh, *, seed: int
) -> TrainState:
    """A state that starts from `params`, which are donated; `seed` is for new adapters."""
    shardings = shardings_of(abstract_state(config, stage, mesh))
    make = jax.jit(
        lambda params, key: initial_state(params, config, stage, key),
        out_shardings=shardings,
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return make(params, jax.random.key(seed))
