"""All that a step changes, as one pytree, and how it comes to lie on the devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from crosslmm_jax.config import ModelConfig, StageConfig
from crosslmm_jax.model import init_params, logical_axes
from crosslmm_jax.parallel import param_shardings, replicated
from crosslmm_jax.train.optimizer import make_optimizer
from crosslmm_jax.train.stages import merge, split


class TrainState(NamedTuple):
    """The state of training after `step` updates."""

    step: Any  # int32[]
    trainable: Any  # parameters that learn, by part
    frozen: Any  # parameters that do not: no gradient, no moments
    opt_state: Any  # of the trainable parameters

    @property
    def params(self) -> dict[str, Any]:
        """All parameters, as the model takes them."""
        return merge(self.trainable, self.frozen)


def new_state(params: Any, stage: StageConfig) -> TrainState:
    """The state before the first step."""
    trainable, frozen = split(params, stage.trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, make_optimizer(stage).init(trainable))


def abstract_state(config: ModelConfig, stage: StageConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of every array of the state; nothing is allocated.

    Moments lie where their parameters do.
    """
    shapes = jax.eval_shape(lambda key: new_state(init_params(config, key), stage), jax.random.key(0))
    trainable, frozen = split(param_shardings(logical_axes(config), shapes.params, mesh), stage.trainable)
    whole = replicated(mesh)
    moments = optax.tree_utils.tree_map_params(
        make_optimizer(stage),
        lambda _, sharding: sharding,
        shapes.opt_state,
        trainable,
        transform_non_params=lambda _: whole,
    )
    shardings = TrainState(whole, trainable, frozen, moments)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def shardings_of(abstract: Any) -> Any:
    """The shardings in a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def random_state(config: ModelConfig, stage: StageConfig, mesh: Mesh, *, seed: int) -> TrainState:
    """A state with random parameters; each device makes its own part, the same values on any mesh."""
    shardings = shardings_of(abstract_state(config, stage, mesh))
    make = jax.jit(
        lambda key: new_state(init_params(config, key), stage),
        out_shardings=shardings,
        compiler_options={"xla_backend_optimization_level": 1},  # runs once: compile it quickly
    )
    with jax.set_mesh(mesh):
        return make(jax.random.key(seed))


def state_of_params(params: Any, config: ModelConfig, stage: StageConfig, mesh: Mesh) -> TrainState:
    """A state that starts from `params`, which may be donated to it."""
    shardings = shardings_of(abstract_state(config, stage, mesh))
    make = jax.jit(lambda params: new_state(params, stage), out_shardings=shardings, donate_argnums=0)
    with jax.set_mesh(mesh):
        return make(params)
