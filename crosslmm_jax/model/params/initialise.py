"""Parameters of a new model, and the logical axes of each."""

import dataclasses
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.crosslmm import CrossLMM
from crosslmm_jax.model.params.tables import AxisTree, Params

# Weights that cross-attention can copy: it has the shapes of its layer's self-attention.
COPIED = ("wq", "bq", "wk", "bk", "wv", "bv", "wo")


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random parameters as nested dicts of float32 arrays: encoder, projector, v2v, t2v, decoder.

    These are what training changes and a MODEL folder holds, whatever `config.visual_matmul` says: see
    `quantise_params`. With `cross_attn_init="copy"`, V2V and T2V start as copies of their layer's
    self-attention.

    May be traced: `jax.eval_shape` allocates nothing, and under `jax.jit` with shardings each device computes
    its own shard.
    """
    return copy_cross_attention(nn.meta.unbox(_boxed(_as_trained(config), key)), config)


def logical_axes(config: ModelConfig) -> AxisTree:
    """The logical axes of every parameter of `init_params`, as a tuple of names per parameter."""
    return quantised_axes(_as_trained(config))


def quantised_axes(config: ModelConfig) -> AxisTree:
    """`logical_axes` of the parameters that `quantise_params` returns for `config.visual_matmul`."""
    boxed = jax.eval_shape(lambda key: _boxed(config, key), jax.random.key(0))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_boxed)


def _as_trained(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, visual_matmul="compute")


def copy_cross_attention(params: Params, config: ModelConfig) -> Params:
    """`params` with V2V and T2V copied from the self-attention of their layers.

    Both norms are copies of the layer's attention norm. With `kv_source="encoder"`, K/V read another width
    than the decoder's: their matrices and their norm stay as they are.
    """
    cross = config.cross_attention
    if cross.cross_attn_init != "copy":
        return params
    decoder = params["decoder"]["layers"]
    layers = jnp.array(config.cross_attention_layers)
    names = COPIED if cross.kv_source == "projected" else ("wq", "bq", "wo")
    copied = {name: decoder[name][layers] for name in names}
    copied["query_norm"] = decoder["attn_norm"][layers]
    if cross.kv_source == "projected":
        copied["kv_norm"] = decoder["attn_norm"][layers]
    return params | {direction: params[direction] | copied for direction in ("v2v", "t2v")}


def _boxed(config: ModelConfig, key: Array) -> Params:
    return cast(Params, CrossLMM(config).init(key, method="declare"))["params"]


def _is_boxed(value: object) -> bool:
    return isinstance(value, nn.LogicallyPartitioned)
