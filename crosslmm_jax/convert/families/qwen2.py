"""Qwen2's parameters under the names of Hugging Face's `Qwen2ForCausalLM`."""

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.convert.rules import HEADS_BIAS, HEADS_IN, HEADS_OUT, LINEAR, Ignored, Rule

_LAYER = "model.layers.{i}."


def attention_rules(hf: str, ours: str) -> tuple[Rule, ...]:
    """Rules of attention with biases on q, k and v only, under the prefixes `hf` and `ours`."""
    return (
        *(Rule(f"{hf}{letter}_proj.weight", f"{ours}w{letter}", HEADS_OUT) for letter in "qkv"),
        *(Rule(f"{hf}{letter}_proj.bias", f"{ours}b{letter}", HEADS_BIAS) for letter in "qkv"),
        Rule(f"{hf}o_proj.weight", f"{ours}wo", HEADS_IN),
    )


RULES = (
    Rule("model.embed_tokens.weight", "decoder.embedding", drop_rows=True),
    Rule(f"{_LAYER}input_layernorm.weight", "decoder.layers.attn_norm"),
    *attention_rules(f"{_LAYER}self_attn.", "decoder.layers."),
    Rule(f"{_LAYER}post_attention_layernorm.weight", "decoder.layers.mlp_norm"),
    Rule(f"{_LAYER}mlp.gate_proj.weight", "decoder.layers.w_gate", LINEAR),
    Rule(f"{_LAYER}mlp.up_proj.weight", "decoder.layers.w_up", LINEAR),
    Rule(f"{_LAYER}mlp.down_proj.weight", "decoder.layers.w_down", LINEAR),
    Rule("model.norm.weight", "decoder.final_norm"),
    Rule("lm_head.weight", "decoder.lm_head", LINEAR, drop_rows=True),
)


def ignored(config: ModelConfig) -> tuple[Ignored, ...]:
    """Tensors that a source of the decoder may hold beside those of `RULES`."""
    tied = (Ignored(r"lm_head\.weight$", "tied to the embedding"),) if config.decoder.tie_embeddings else ()
    return (Ignored(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", "computed, not learnt"), *tied)
