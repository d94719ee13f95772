"""`TrainState`: everything that a step changes, as one pytree, and how it is made and sharded."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from crosslmm_jax.config import ModelConfig, StageConfig
from crosslmm_jax.model import Params, init_params, logical_axes
from crosslmm_jax.parallel import param_shardings, replicated
from crosslmm_jax.train.optimizer import make_optimizer
from crosslmm_jax.train.stages import merge, split


class TrainState(NamedTuple):
    """State of training after `step` updates; parameters and moments are float32."""

    step: Int[Array, ""]
    trainable: PyTree[Array]  # part -> its parameters, a `Params`
    frozen: PyTree[Array]  # the other parts: no gradient, no moments
    opt_state: PyTree[Array]  # of the trainable parameters

    @property
    def params(self) -> Params:
        """All parameters, as the model takes them."""
        return merge(self.trainable, self.frozen)


def initial_state(params: Params, stage: StageConfig) -> TrainState:
    """The state before the first step."""
    trainable, frozen = split(params, stage)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, make_optimizer(stage).init(trainable))


def abstract_state(config: ModelConfig, stage: StageConfig, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every array of the state, as `jax.ShapeDtypeStruct`.

    Nothing is allocated. Moments are sharded like their parameters.
    """
    shapes = jax.eval_shape(lambda key: initial_state(init_params(config, key), stage), jax.random.key(0))
    trainable, frozen = split(param_shardings(logical_axes(config), shapes.params, mesh), stage)
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


def shardings_of(abstract: PyTree[jax.ShapeDtypeStruct]) -> PyTree[jax.sharding.Sharding]:
    """The shardings in a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def random_state(config: ModelConfig, stage: StageConfig, mesh: Mesh, *, seed: int) -> TrainState:
    """A state with random parameters: the same values on any mesh, each shard made on its device."""
    make = jax.jit(
        lambda key: initial_state(init_params(config, key), stage),
        out_shardings=shardings_of(abstract_state(config, stage, mesh)),
        compiler_options={"xla_backend_optimization_level": 1},  # runs once: compile it quickly
    )
    with jax.set_mesh(mesh):
        return make(jax.random.key(seed))


def state_of_params(params: Params, config: ModelConfig, stage: StageConfig, mesh: Mesh) -> TrainState:
    """A state that starts from `params`, which are donated."""
    shardings = shardings_of(abstract_state(config, stage, mesh))
    make = jax.jit(lambda params: initial_state(params, stage), out_shardings=shardings, donate_argnums=0)
    with jax.set_mesh(mesh):
        return make(params)
