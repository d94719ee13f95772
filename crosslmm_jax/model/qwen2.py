"""Qwen2 decoder layers: parameters as one table, one layer as one function.

Reference implementation: Hugging Face's `Qwen2ForCausalLM` (RMSNorm, grouped-query attention with biases on
q, k and v only, rotary positions, SwiGLU).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crosslmm_jax.config import AttentionBackend, DecoderConfig
from crosslmm_jax.model.attention.dispatch import attention, named_attention
from crosslmm_jax.model.kv_cache import LayerCache
from crosslmm_jax.model.ops import (
    Rotary,
    from_heads,
    matmul,
    pad_tokens,
    rms_norm,
    rotate,
    to_heads,
)
from crosslmm_jax.model.params.partitioning import AxisRules
from crosslmm_jax.model.params.tables import Weight, WeightTable, fan_in, normal, ones, stack, zeros


def attention_weights(config: DecoderConfig, kv_width: int) -> dict[str, Weight]:
    """Qwen2's attention, without a bias on the output. Keys and values are made from width `kv_width`."""
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


def decoder_weights(config: DecoderConfig, *, stacked: bool = True) -> WeightTable:
    """Embedding, all layers, final norm, and the head unless it is tied to the embedding."""
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
        "layers": stack(config.num_layers, layer, stacked=stacked),
        "final_norm": Weight((D,), ("embed",), ones),
    }
    if not config.tie_embeddings:
        table["lm_head"] = Weight((D, V), ("embed", "vocab"), fan_in(D))
    return table


def rotary_of(config: DecoderConfig) -> Rotary:
    """The rotary embedding of self-attention."""
    rotary = Rotary.of(config.rope_theta, config.head_dim)
    if config.yarn_factor == 1:
        return rotary
    return rotary.with_yarn(factor=config.yarn_factor, trained_positions=config.yarn_trained_positions)


@named_attention("self_attention")
def self_attention(
    weights: dict[str, Array],
    x: Float[Array, "b u d"],
    positions: Int[Array, "b t"],
    *,
    config: DecoderConfig,
    backend: AttentionBackend,
    cache: LayerCache | None = None,
    rules: AxisRules | None = None,
) -> tuple[Float[Array, "b u d"], Float[Array, "b s k h"], Float[Array, "b s k h"]]:
    """Causal self-attention with its residual, over a whole sequence or after a KV cache.

    Args:
      weights: one layer's, in the compute dtype.
      x: T text tokens and padding, U >= T (`with_fewest_rows`).
      positions: for the rotary embedding.
      config: the decoder's configuration.
      backend: the attention backend.
      cache: keys and values of earlier tokens, to which the new ones are added.
      rules: logical axis -> mesh axes.

    Returns:
      The hidden states, and all keys and values: S = T, or the room of the cache.
    """
    w, length = weights, positions.shape[1]
    y = rms_norm(x, w["attn_norm"], config.rms_norm_eps)
    q, k, v = (to_heads(y, w["w" + name], w["b" + name])[:, :length] for name in "qkv")
    rotary = rotary_of(config)
    q, k = rotate(q, positions, rotary), rotate(k, positions, rotary)
    if cache is None:
        out = attention(q, k, v, causal=True, backend=backend, rules=rules)
    else:
        k, v, *_ = cache.extended(k, v)
        stop = cache.num_tokens[:, None] + jnp.arange(1, length + 1)
        out = attention(q, k.astype(q.dtype), v.astype(q.dtype), kv_stop=stop, backend=backend, rules=rules)
    return x + from_heads(pad_tokens(out, x.shape[1]), w["wo"]), k, v


@jax.named_scope("mlp")
def mlp(
    weights: dict[str, Array], x: Float[Array, "b t d"], *, config: DecoderConfig
) -> Float[Array, "b t d"]:
    """SwiGLU with its pre-norm and residual."""
    w = weights
    y = rms_norm(x, w["mlp_norm"], config.rms_norm_eps)
    return x + matmul(jax.nn.silu(matmul(y, w["w_gate"])) * matmul(y, w["w_up"]), w["w_down"])
