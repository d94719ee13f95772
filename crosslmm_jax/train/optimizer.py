"""AdamW with warm-up and cosine decay, a learning-rate scale per parameter group, and gradient clipping.

LLaVA's recipe: no weight decay on norms, biases and gates; gradients are clipped by their global norm. The
optimiser sees the trainable parameters only, so frozen ones have no moments.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from crosslmm_jax.config import ModelConfig, StageConfig
from crosslmm_jax.model import is_decayed
from crosslmm_jax.train.stages import ADAPTERS, trained_of_model

Path = tuple[str, ...]


def group_of(path: Path) -> str:
    """The learning-rate group of the parameter at `path`: encoder, cross_attention, gate, lora or base."""
    if path[0] == ADAPTERS:
        return "lora"
    if path[0] in ("v2v", "t2v"):
        return "gate" if path[-1] == "gate" else "cross_attention"
    return "encoder" if path[0] == "encoder" else "base"


def group_scales(stage: StageConfig) -> dict[str, float]:
    """Group -> its learning rate as a multiple of `stage.learning_rate`."""
    return {
        "base": 1.0,
        "encoder": stage.vision_lr_scale,
        "cross_attention": stage.cross_attn_lr_scale,
        "gate": stage.cross_attn_lr_scale * stage.gate_lr_scale,
        "lora": stage.lora.lr_scale,
    }


def warmup_steps(stage: StageConfig) -> int:
    """Steps of linear warm-up, rounded up as Hugging Face rounds `warmup_ratio`."""
    return math.ceil(stage.warmup_ratio * stage.steps)


def learning_rate_schedule(stage: StageConfig) -> optax.Schedule:
    """A function from updates done to the learning rate of the next one: linear from 0, then cosine to 0.

    Equals Hugging Face's `get_cosine_schedule_with_warmup`; the first update has rate 0. Not
    `optax.warmup_cosine_decay_schedule`, whose rates differ from these in their last bit at one step in five:
    weights would no longer be bit-equal to those of earlier runs.
    """
    warmup = warmup_steps(stage)
    decay = max(stage.steps - warmup, 1)

    def learning_rate(updates_done: ArrayLike) -> Float[Array, ""]:
        count = jnp.asarray(updates_done, jnp.float32)
        rising = count / max(warmup, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((count - warmup) / decay, 0, 1)))
        return stage.learning_rate * jnp.where(count < warmup, rising, falling)

    return learning_rate


def learning_rates(model: ModelConfig, stage: StageConfig, count: int) -> dict[str, float]:
    """Group that learns -> learning rate of the update that follows `count` updates, for reports."""
    learning_rate = np.asarray(learning_rate_schedule(stage)(count)).item()
    groups = {group_of(tuple(name.split("."))) for name in trained_of_model(model, stage)}
    return {group: learning_rate * scale for group, scale in group_scales(stage).items() if group in groups}


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """AdamW for the trainable parameters of `stage`, which are nested dicts as of `stages.split`.

    Moments are float32. As in torch, the learning rate of a group scales its weight decay too.
    """
    scales = group_scales(stage)
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm),
        optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(stage.weight_decay, mask=decay_mask),
        optax.stateless(lambda updates, _: _scale_groups(updates, scales)),
        optax.scale_by_learning_rate(learning_rate_schedule(stage)),
    )


def decay_mask(params: PyTree[Array]) -> PyTree[bool]:
    """Whether weight decay applies to each parameter, as a tree like `params`."""
    return map_with_path(lambda path, _: is_decayed(path), params)


def _scale_groups(updates: PyTree[Array], scales: Mapping[str, float]) -> PyTree[Array]:
    return map_with_path(lambda path, update: scales[group_of(path)] * update, updates)


def map_with_path(function: Callable[[Path, Array], object], tree: PyTree[Array]) -> PyTree:
    """`jax.tree.map` of `function(path, leaf)` over nested dicts and adapters; a path is a tuple of keys."""

    def call(path: jax.tree_util.KeyPath, leaf: Array) -> object:
        return function(tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path), leaf)

    return jax.tree_util.tree_map_with_path(call, tree)
