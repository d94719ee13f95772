"""The parameters that only CrossLMM has: V2V and T2V, their gates, and the projector's optional norm.

`{i}` is the decoder layer that has the cross-attention, so that its keys are numbered like the decoder's.
"""

from crosslmm_jax.convert.families.qwen2 import attention_rules
from crosslmm_jax.convert.rules import Rule


def _direction_rules(direction: str) -> tuple[Rule, ...]:
    layer = "model.layers.{i}."
    attention = f"{layer}{direction}_attn."
    return (
        *attention_rules(attention, f"{direction}."),
        Rule(f"{attention}query_norm.weight", f"{direction}.query_norm"),
        Rule(f"{attention}kv_norm.weight", f"{direction}.kv_norm"),
        Rule(f"{layer}{direction}_gate", f"{direction}.gate"),
    )


PROJECTOR_RULES = (
    Rule("multi_modal_projector.input_norm.weight", "projector.norm_scale"),
    Rule("multi_modal_projector.input_norm.bias", "projector.norm_bias"),
)
RULES = (*_direction_rules("v2v"), *_direction_rules("t2v"), *PROJECTOR_RULES)
