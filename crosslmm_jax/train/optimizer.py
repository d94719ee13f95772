"""AdamW with warm-up and cosine, a learning-rate scale for each group of parameters, and clipping.

LLaVA's recipe: no decay on norms, biases and gates, gradients clipped by their global norm. It is given the
trainable parameters alone, so frozen ones have no moments.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crosslmm_jax.config import StageConfig
from crosslmm_jax.model import is_decayed

Path = tuple[str, ...]


def group_of(path: Path) -> str:
    """The learning-rate group of the parameter at `path`: encoder, cross_attention, gate or base."""
    if path[0] in ("v2v", "t2v"):
        return "gate" if path[-1] == "gate" else "cross_attention"
    return "encoder" if path[0] == "encoder" else "base"


def group_scales(stage: StageConfig) -> dict[str, float]:
    """Group -> its learning rate as a multiple of `stage.learning_rate`, for the groups that learn."""
    scales: dict[str, float] = {}
    if {"projector", "decoder"} & set(stage.trainable):
        scales["base"] = 1.0
    if "encoder" in stage.trainable:
        scales["encoder"] = stage.vision_lr_scale
    if {"v2v", "t2v"} & set(stage.trainable):
        scales["cross_attention"] = stage.cross_attn_lr_scale
        scales["gate"] = stage.cross_attn_lr_scale * stage.gate_lr_scale
    return scales


def warmup_steps(stage: StageConfig) -> int:
    """Steps of linear warm-up; rounded up, as Hugging Face's `warmup_ratio` is."""
    return math.ceil(stage.warmup_ratio * stage.steps)


def schedule(stage: StageConfig) -> Callable[[Any], Any]:
    """Updates done -> learning rate of the next one: linear from 0, then half a cosine down to 0.

    The same values as Hugging Face's `get_cosine_schedule_with_warmup`, whose first update has rate 0.
    """
    warmup = warmup_steps(stage)
    decay = max(stage.steps - warmup, 1)

    def rate(count: Any) -> Any:
        count = jnp.asarray(count, jnp.float32)
        rising = count / max(warmup, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((count - warmup) / decay, 0, 1)))
        return stage.learning_rate * jnp.where(count < warmup, rising, falling)

    return rate


def learning_rates(stage: StageConfig, count: int) -> dict[str, float]:
    """The learning rate of each group in the update that follows `count` others, for reports."""
    rate = np.asarray(schedule(stage)(count)).item()
    return {group: rate * scale for group, scale in group_scales(stage).items()}


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """AdamW of `stage` for its trainable parameters: nested dicts whose top keys are parts.

    Moments are float32. As in torch, decay is scaled by the group's learning rate and not by the gradient.
    """
    scales = group_scales(stage)

    def scale_groups(updates: Any) -> Any:
        return map_with_path(_scaled_by(scales), updates)

    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm),
        optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(stage.weight_decay, mask=decay_mask),
        optax.stateless(lambda updates, _: scale_groups(updates)),
        optax.scale_by_learning_rate(schedule(stage)),
    )


def decay_mask(params: Any) -> Any:
    """A tree like `params` of bools: whether weight decay applies."""
    return map_with_path(_decayed, params)


def map_with_path(function: Any, tree: Any) -> Any:
    """`jax.tree.map` of `function(path, leaf)` over nested dicts, with the keys as a tuple of str."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(tuple(str(entry.key) for entry in path), leaf), tree
    )


def _decayed(path: Path, leaf: Any) -> bool:
    del leaf
    return is_decayed(path)


def _scaled_by(scales: Mapping[str, float]) -> Any:
    def scaled(path: Path, update: Any) -> Any:
        return scales[group_of(path)] * update

    return scaled
