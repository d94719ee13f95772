"""Parameters of a new model, and the logical axes of each."""

import dataclasses
import zlib
from collections.abc import Collection, Mapping
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model.crosslmm import CrossLMM
from crosslmm_jax.model.dual_cross_attention import cross_attention_weights
from crosslmm_jax.model.params.low_rank import LowRank, low_rank_weights
from crosslmm_jax.model.params.tables import AxisTree, Params, Weight, input_dims
from crosslmm_jax.model.qwen2 import decoder_weights

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


def adapted_matrices(config: ModelConfig) -> tuple[str, ...]:
    """Names of the matrices that LoRA can adapt: those of decoder layers and of cross-attention."""
    return tuple(_adaptable(config))


def init_adapters(
    config: ModelConfig, names: Collection[str], key: Array, *, rank: int, scale: float
) -> dict[str, LowRank]:
    """A new adapter for each of some matrices, by name.

    Args:
      config: the model configuration.
      names: of the matrices, such as "decoder.layers.wq".
      key: for A; B is 0.
      rank: of the adapters.
      scale: of their products.
    """

    def adapter(name: str, weight: Weight) -> LowRank:
        a, b = low_rank_weights(weight, inputs=input_dims(name.split(".")[-1]), rank=rank)
        key_of_a = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return LowRank(a.init(key_of_a, a.shape), b.init(key_of_a, b.shape), scale)

    return {name: adapter(name, weight) for name, weight in _some(config, names).items()}


def adapter_axes(
    config: ModelConfig, names: Collection[str], *, rank: int, scale: float
) -> dict[str, LowRank]:
    """The logical axes of every array of `init_adapters`."""

    def axes(name: str, weight: Weight) -> LowRank:
        a, b = low_rank_weights(weight, inputs=input_dims(name.split(".")[-1]), rank=rank)
        return LowRank(a.axes, b.axes, scale)  # type: ignore[arg-type]

    return {name: axes(name, weight) for name, weight in _some(config, names).items()}


def _some(config: ModelConfig, names: Collection[str]) -> dict[str, Weight]:
    return {name: weight for name, weight in _adaptable(config).items() if name in names}


def _adaptable(config: ModelConfig) -> dict[str, Weight]:
    layers, cross = decoder_weights(config.decoder)["layers"], cross_attention_weights(config)
    tables = {"decoder.layers": layers, "v2v": cross, "t2v": cross}
    return {
        f"{stack}.{name}": weight
        for stack, table in tables.items()
        for name, weight in cast(Mapping[str, Weight], table).items()
        if name.startswith("w")
    }


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
