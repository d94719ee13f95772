"""Parameters of a new model, and the logical axes of each."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.crosslmm import CrossLMM

Params = dict[str, Any]

# Cross-attention is shaped like the layer's self-attention, so that it can start as a copy of it.
COPIED = ("wq", "bq", "wk", "bk", "wv", "bv", "wo")


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random parameters as nested dicts of float32 arrays: encoder, projector, v2v, t2v, decoder.

    They are those that training changes and a MODEL folder holds, whatever `config.visual_matmul` says: see
    `quantise_params`.

    With `cross_attn_init="copy"`, V2V and T2V start as copies of their layer's self-attention. May be
    traced: under `jax.eval_shape` nothing is allocated, under `jax.jit` with shardings each device makes
    its own part.
    """
    return copy_cross_attention(nn.meta.unbox(_boxed(_as_trained(config), key)), config)


def logical_axes(config: ModelConfig) -> Params:
    """The tree of `init_params` with the logical axis names of each parameter as a tuple."""
    return quantised_axes(_as_trained(config))


def quantised_axes(config: ModelConfig) -> Params:
    """The same of the tree that `quantise_params` makes with `config.visual_matmul`."""
    boxed = jax.eval_shape(lambda key: _boxed(config, key), jax.random.key(0))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=_is_boxed)


def _as_trained(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, visual_matmul="compute")


def copy_cross_attention(params: Params, config: ModelConfig) -> Params:
    """`params` with V2V and T2V copied from the self-attention of the layers that carry them.

    Both norms start from the layer's attention norm. Keys and values that are read from another width
    than the decoder's (`kv_source="encoder"`), and their norm, stay as they are.
    """
    cross = config.cross_attention
    if cross.cross_attn_init != "copy":
        return params
    source = params["decoder"]["layers"]
    layers = jnp.array(config.cross_attention_layers)
    names = COPIED if cross.kv_source == "projected" else ("wq", "bq", "wo")
    copied = {name: source[name][layers] for name in names}
    copied["query_norm"] = source["attn_norm"][layers]
    if cross.kv_source == "projected":
        copied["kv_norm"] = source["attn_norm"][layers]
    return params | {direction: params[direction] | copied for direction in ("v2v", "t2v")}


def _boxed(config: ModelConfig, key: Array) -> Params:
    variables: Any = CrossLMM(config).init(key, method="declare")
    return variables["params"]


def _is_boxed(value: Any) -> bool:
    return isinstance(value, nn.LogicallyPartitioned)
