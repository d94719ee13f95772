"""Weights in the form that inference reads, made once from a MODEL folder's."""

import functools

import jax
from jax.sharding import Mesh

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model import Params, init_params, quantise_params, quantised_axes, separate_layers
from crosslmm_jax.parallel import param_shardings

QUANTISED = ("encoder", "projector")


def prepare_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Parameters with separate layers, and matrices quantised as `config.visual_matmul` says.

    Takes `params` apart on the way, so that at most one stack of layers exists twice. In 8 bits, encoder and
    projector exist twice too, until the caller drops `params`.

    Args:
      params: as `init_params` makes them, on the devices of `mesh`. What does not change is not copied.
      config: the model configuration.
      mesh: devices to put the result on, by the table of logical axes.
    """
    if config.visual_matmul != "compute":
        params = {**params, **_quantised(params, config, mesh)}
    return separate_layers(params, consume=True)


def prepared_shapes(config: ModelConfig) -> Params:
    """Shapes and dtypes of what `prepare_params` makes of weights that were loaded in the compute dtype."""

    def prepared() -> Params:
        params = jax.tree.map(
            lambda x: x.astype(config.compute_dtype), init_params(config, jax.random.key(0))
        )
        parts = {part: params[part] for part in QUANTISED}
        if config.visual_matmul != "compute":
            parts = quantise_params(parts, precision=config.visual_matmul)
        return {**params, **parts}

    return separate_layers(jax.eval_shape(prepared))


def _quantised(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    parts = {part: params[part] for part in QUANTISED}
    quantise = functools.partial(quantise_params, precision=config.visual_matmul)
    axes = quantised_axes(config)
    axes = {part: axes[part] for part in QUANTISED}
    shardings = param_shardings(axes, jax.eval_shape(quantise, parts), mesh)
    return jax.jit(quantise, out_shardings=shardings)(parts)
