"""Qwen2 decoder layers: parameters as one table, one layer as one function.

Reference implementation: Hugging Face's `Qwen2ForCausalLM` (RMSNorm, grouped-query attention with biases on
q, k and v only, rotary positions, SwiGLU).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import AttentionBackend, DecoderConfig
from crosslmm_jax.model.attention import attention
from crosslmm_jax.model.ops import rms_norm, rotate
from crosslmm_jax.model.weights import Weight, WeightTable, fan_in, normal, ones, stack, zeros


def attention_weights(config: DecoderConfig, kv_width: int) -> dict[str, Weight]:
    """Qwen2's attention, without a bias on the output. Keys and values are read from width `kv_width`."""
    D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim
    kv_embed = "embed" if kv_width == D else "vision_embed"
    return {
        "wq": Weight((D, N, H), ("embed", "heads", "head_dim"), fan_in(D)),
        "bq": Weight((N, H), ("heads", "head_dim"), zeros),
        "wk": Weight((kv_width, K, H), (kv_embed, "kv_heads", "head_dim"), fan_in(kv_width)),
        "bk": Weight((K, H), ("kv_heads", "head_dim"), zeros),
        "wv": Weight((kv_width, K, H), (kv_embed, "kv_heads", "head_dim"), fan_in(kv_width)),
        "bv": Weight((K, H), ("kv_heads", "head_dim"), zeros),
        "wo": Weight((N, H, D), ("heads", "head_dim", "embed"), fan_in(N * H)),
    }


def decoder_weights(config: DecoderConfig) -> WeightTable:
    """Embedding, all layers stacked, final norm, and the head unless it is tied to the embedding."""
    D, M, V = config.width, config.mlp_width, config.vocab_size
    layer = {
        "attn_norm": Weight((D,), ("embed",), ones),
        **attention_weights(config, D),
        "mlp_norm": Weight((D,), ("embed",), ones),
        "w_gate": Weight((D, M), ("embed", "mlp"), fan_in(D)),
        "w_up": Weight((D, M), ("embed", "mlp"), fan_in(D)),
        "w_down": Weight((M, D), ("mlp", "embed"), fan_in(M)),
    }
    table = {
        "embedding": Weight((V, D), ("vocab", "embed"), normal(D**-0.5)),
        "layers": stack(config.num_layers, layer),
        "final_norm": Weight((D,), ("embed",), ones),
    }
    if not config.tie_embeddings:
        table["lm_head"] = Weight((D, V), ("embed", "vocab"), fan_in(D))
    return table


class LayerCache(NamedTuple):
    """The self-attention cache as one layer sees it: everybody's keys and values, and its own place.

    The stacks stay whole, so that a scan over layers carries and updates them in place.
    """

    keys: Float[Array, "l b s k h"]
    values: Float[Array, "l b s k h"]
    layer: Int[Array, ""]
    lengths: Int[Array, " b"]  # tokens each row holds already: where the new ones are written

    def extended(self, k: Float[Array, "b t k h"], v: Float[Array, "b t k h"]) -> "LayerCache":
        """The cache with T new keys and values written behind each row's tokens."""
        rows = jnp.arange(k.shape[0])[:, None]
        places = self.lengths[:, None] + jnp.arange(k.shape[1])
        keys = self.keys.at[self.layer, rows, places].set(k.astype(self.keys.dtype), unique_indices=True)
        values = self.values.at[self.layer, rows, places].set(
            v.astype(self.values.dtype), unique_indices=True
        )
        return self._replace(keys=keys, values=values)

    def own(self) -> tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]]:
        """This layer's keys and values."""
        return self.keys[self.layer], self.values[self.layer]


@jax.named_scope("self_attention")
def self_attention(
    weights: dict[str, Array],
    x: Float[Array, "b t d"],
    positions: Int[Array, "b t"],
    *,
    config: DecoderConfig,
    backend: AttentionBackend,
    cache: LayerCache | None = None,
    from_empty: bool = False,
) -> tuple[Float[Array, "b t d"], LayerCache | None]:
    """Causal self-attention with its residual; reads and extends `cache` when there is one.

    Args:
      weights: one layer's, in the compute dtype.
      x: float[B, T, D].
      positions: int32[B, T], for the rotary embedding.
      config: the decoder's.
      backend: of the attention.
      cache: keys and values of earlier tokens, to which the new ones are added.
      from_empty: the cache holds no earlier token, so that the new keys alone are read.

    Returns:
      float[B, T, D] and the extended cache (None without one).
    """
    w = weights
    y = rms_norm(x, w["attn_norm"], config.rms_norm_eps)
    q = jnp.einsum("btd,dnh->btnh", y, w["wq"]) + w["bq"]
    k = jnp.einsum("btd,dkh->btkh", y, w["wk"]) + w["bk"]
    v = jnp.einsum("btd,dkh->btkh", y, w["wv"]) + w["bv"]
    q, k = rotate(q, positions, theta=config.rope_theta), rotate(k, positions, theta=config.rope_theta)
    if cache is not None:
        cache = cache.extended(k, v)
    if cache is None or from_empty:
        out = attention(q, k, v, causal=True, backend=backend)
    else:
        keys, values = cache.own()
        stop = cache.lengths[:, None] + jnp.arange(1, x.shape[1] + 1)
        out = attention(q, keys.astype(q.dtype), values.astype(q.dtype), kv_stop=stop, backend=backend)
    return x + jnp.einsum("btnh,nhd->btd", out, w["wo"]), cache


@jax.named_scope("mlp")
def mlp(
    weights: dict[str, Array], x: Float[Array, "b t d"], *, config: DecoderConfig
) -> Float[Array, "b t d"]:
    """SwiGLU with its pre-norm and residual."""
    w = weights
    y = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
    return x + (jax.nn.silu(y @ w["w_gate"]) * (y @ w["w_up"])) @ w["w_down"]
