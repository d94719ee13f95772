"""LLaVA-OneVision and LLaVA-Video: the projector, and the three layouts of such checkpoints.

- original, `LlavaQwenForCausalLM`: `model.vision_tower.vision_tower.vision_model.`, `model.mm_projector.0.`,
  `model.layers.`, `model.image_newline`;
- Hugging Face: `vision_tower.vision_model.`, `multi_modal_projector.linear_1.`, `language_model.model.`;
- Hugging Face since 4.52: `model.vision_tower.`, `model.multi_modal_projector.`, `model.language_model.`.

All names are first changed to those of our export, so that one table serves every layout.
"""

import re

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.convert.families import cross, qwen2, siglip
from crosslmm_jax.convert.rules import LINEAR, Ignored, Rule, prefixed

PROJECTOR_RULES = (
    Rule("multi_modal_projector.linear_1.weight", "projector.w1", LINEAR),
    Rule("multi_modal_projector.linear_1.bias", "projector.b1"),
    Rule("multi_modal_projector.linear_2.weight", "projector.w2", LINEAR),
    Rule("multi_modal_projector.linear_2.bias", "projector.b2"),
)
VISION_RULES = prefixed(siglip.RULES, siglip.PREFIX)
# Every parameter of every model, under the names of `crosslmm convert to-hf`.
EXPORT_RULES = (*VISION_RULES, *PROJECTOR_RULES, *qwen2.RULES, *cross.RULES)

_TOWER = r"(?:vision_model\.)?(?=embeddings\.|encoder\.|post_layernorm\.|head\.)"
# (pattern, replacement); the first pattern that matches is replaced.
_SPELLINGS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (rf"model\.vision_tower\.vision_tower\.{_TOWER}", siglip.PREFIX),
        (rf"model\.vision_tower\.{_TOWER}", siglip.PREFIX),
        (rf"vision_tower\.{_TOWER}", siglip.PREFIX),
        (_TOWER, siglip.PREFIX),
        (r"(?:.*\.)?mm_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"(?:.*\.)?mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"model\.language_model\.", "model."),
        (r"language_model\.", ""),
        (r"model\.image_newline$", "image_newline"),
    )
)


def canonical(name: str) -> str:
    """The name in our export of the tensor `name` of any layout. Unknown names stay as they are."""
    for pattern, replacement in _SPELLINGS:
        match = pattern.match(name)
        if match:
            return replacement + name[match.end() :]
    return name


NEWLINE = Ignored(r"image_newline$", "ends the rows of an image in LLaVA's prompts; ours have no such token")


def ignored(config: ModelConfig) -> tuple[Ignored, ...]:
    """Tensors that a LLaVA checkpoint may hold beside those of the rules."""
    return (*siglip.ignored(config), *qwen2.ignored(config), NEWLINE)
