"""One pure training step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from crosslmm_jax.batch import AllOrNone, Batch, needed, with_known_visibility
from crosslmm_jax.config import ModelConfig, StageConfig
from crosslmm_jax.model import CrossLMM, Params, Scores, apply
from crosslmm_jax.parallel import activation_rules, matmul_options, replicated
from crosslmm_jax.train.optimizer import make_optimizer
from crosslmm_jax.train.stages import merge, model_of_stage
from crosslmm_jax.train.state import TrainState, abstract_state, shardings_of

Metrics = dict[str, PyTree[Array]]
TrainStep = Callable[[TrainState, Batch[Array]], tuple[TrainState, Metrics]]
ScoresFunction = Callable[[Params, Batch[Array]], Scores]


def with_step_visibility(batch: Batch[np.ndarray]) -> Batch[np.ndarray]:
    """This process's `batch` with `AllOrNone` visible frames where that holds, for a faster step.

    Such a step is 3% faster on one H200 (64 frames). The price: a run with batches of both types compiles two
    programs for each of its shapes. One of several processes knows its own rows only, and all have to run the
    same program: there nothing is known.
    """
    known = with_known_visibility(batch, needed(batch.frames, "frames").shape[1])
    if jax.process_count() > 1 or not isinstance(known.visible_frames, AllOrNone):
        return batch
    return batch._replace(visible_frames=AllOrNone(batch.visible_frames.counts))


def make_train_step(config: ModelConfig, stage: StageConfig) -> TrainStep:
    """The pure function `train_step(state, batch) -> (state, metrics)` of a stage.

    The loss is the mean over all targets of the global batch, however it is split into rows, devices and
    microbatches. Metrics are scalars, except for the gates:

        loss        nats per target, before the update
        grad_norm   global norm of the gradient, before clipping
        weight      targets in the batch
        finite      whether loss and grad_norm are finite
        gate        direction -> float32[layers], tanh of the gates after the update
    """
    config, microbatches = model_of_stage(config, stage), _number_of_microbatches(stage)
    model, optimizer = CrossLMM(config, rules=activation_rules()), make_optimizer(stage)

    def train_step(state: TrainState, batch: Batch[Array]) -> tuple[TrainState, Metrics]:
        def objective(trainable: PyTree, batch: Batch[Array]) -> tuple[Array, Array]:
            return apply(model, merge(trainable, state.frozen), CrossLMM.loss, batch)

        loss_sum, weight, grads = _accumulate(objective, state.trainable, batch, microbatches)
        count = jnp.maximum(weight, 1)
        grads = jax.tree.map(lambda grad: grad / count, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        updated = optax.apply_updates(state.trainable, updates), opt_state
        # Without a target nothing changes: moments and weight decay would move parameters even so.
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(weight > 0, new, old), updated, (state.trainable, state.opt_state)
        )
        new = TrainState(state.step + 1, trainable, state.frozen, opt_state)
        loss, grad_norm = loss_sum / count, optax.tree.norm(grads)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "weight": weight,
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
            "gate": {direction: jnp.tanh(new.params[direction]["gate"]) for direction in stage.directions},
        }
        return new, metrics

    return train_step


def _number_of_microbatches(stage: StageConfig) -> int:
    if stage.microbatches is None:
        raise ValueError("StageConfig.microbatches is None; `fewest_microbatches` gives a number")
    return stage.microbatches


def _accumulate(
    objective: Callable[[PyTree, Batch[Array]], tuple[Array, Array]],
    trainable: PyTree,
    batch: Batch[Array],
    microbatches: int,
) -> tuple[Array, Array, PyTree]:
    """Losses, targets and gradients, each summed over all microbatches."""
    gradient = jax.value_and_grad(objective, has_aux=True)
    if microbatches == 1:
        (loss_sum, weight), grads = gradient(trainable, batch)
        return loss_sum, weight, grads

    def add(sums: PyTree, microbatch: Batch[Array]) -> tuple[PyTree, None]:
        (loss_sum, weight), grads = gradient(trainable, microbatch)
        return jax.tree.map(jnp.add, sums, (loss_sum, weight, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable))
    return jax.lax.scan(add, start, _interleaved(batch, microbatches))[0]


def _interleaved(batch: Batch[Array], microbatches: int) -> Batch[Array]:
    """The microbatches, stacked. Microbatch j takes rows j, m+j, ...: rows stay on their devices."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1), batch)


def compile_scores(config: ModelConfig, stage: StageConfig, mesh: Mesh) -> ScoresFunction:
    """The function `scores(params, batch)` of a stage's model under `jax.jit`, without a gradient.

    Call it within `jax.set_mesh(mesh)`. It takes as many microbatches as a step.
    """
    model = CrossLMM(model_of_stage(config, stage), rules=activation_rules())
    microbatches = _number_of_microbatches(stage)

    def scores(params: Params, batch: Batch[Array]) -> Scores:
        if microbatches == 1:
            return apply(model, params, CrossLMM.scores, batch)

        def add(sums: Scores, microbatch: Batch[Array]) -> tuple[Scores, None]:
            return jax.tree.map(jnp.add, sums, apply(model, params, CrossLMM.scores, microbatch)), None

        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(add, Scores(zero, zero, zero), _interleaved(batch, microbatches))[0]

    return jax.jit(scores, out_shardings=replicated(mesh), compiler_options=matmul_options())


def compile_train_step(config: ModelConfig, stage: StageConfig, mesh: Mesh) -> TrainStep:
    """`make_train_step` under `jax.jit`; call it within `jax.set_mesh(mesh)`. It donates its state."""
    shardings = shardings_of(abstract_state(config, stage, mesh))
    return jax.jit(
        make_train_step(config, stage),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=matmul_options(),
    )
