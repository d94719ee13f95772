"""Weights as inference reads them, made once from those that training left."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model import quantise_params, quantised_axes, separate_layers
from crosslmm_jax.parallel import param_shardings

QUANTISED = ("encoder", "projector")


def prepare_params(params: dict[str, Any], config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """`params` of `init_params` with matrices quantised as `config.visual_matmul` says, an array a layer.

    Takes `params` apart on the way: no more than one stack of layers is there twice, and besides, in 8 bits,
    encoder and projector as they were until the caller lets go of `params`.

    Args:
      params: on the devices of `mesh`; arrays that stay as they are are passed on, not copied.
      config: the model's.
      mesh: devices to lay the result on, by the table of logical axes.
    """
    if config.visual_matmul != "compute":
        params = {**params, **_quantised(params, config, mesh)}
    return separate_layers(params, consume=True)


def _quantised(params: dict[str, Any], config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    parts = {part: params[part] for part in QUANTISED}
    quantise = functools.partial(quantise_params, precision=config.visual_matmul)
    axes = quantised_axes(config)
    axes = {part: axes[part] for part in QUANTISED}
    shardings = param_shardings(axes, jax.eval_shape(quantise, parts), mesh)
    return jax.jit(quantise, out_shardings=shardings)(parts)
