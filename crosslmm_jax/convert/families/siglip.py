"""SigLIP's parameters: Hugging Face's `SiglipVisionModel`, and big_vision's `.npz` files.

Both projects' two-tower models hold the same vision tower. The text tower, the attention-pooling head and the
layers above the one that features are read from are listed as ignored.
"""

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.convert.rules import (
    BATCH,
    HEADS_BIAS,
    HEADS_IN,
    HEADS_OUT,
    IDENTITY,
    IMAGE_KERNEL,
    LINEAR,
    PATCH,
    Ignored,
    Rule,
    Transform,
)

# The tower's prefix in our export, to which the prefixes of all other layouts are changed.
PREFIX = "vision_model."
HEAD = "attention-pooling head: features are read patch by patch"
TEXT = "text tower: the decoder reads the text"


def _layer_rules() -> tuple[Rule, ...]:
    layer, ours = "encoder.layers.{i}.", "encoder.layers."
    rules = []
    for number in "12":
        rules += [
            Rule(f"{layer}layer_norm{number}.weight", f"{ours}norm{number}_scale"),
            Rule(f"{layer}layer_norm{number}.bias", f"{ours}norm{number}_bias"),
            Rule(f"{layer}mlp.fc{number}.weight", f"{ours}w{number}", LINEAR),
            Rule(f"{layer}mlp.fc{number}.bias", f"{ours}b{number}"),
        ]
    for letter in "qkv":
        rules += [
            Rule(f"{layer}self_attn.{letter}_proj.weight", f"{ours}w{letter}", HEADS_OUT),
            Rule(f"{layer}self_attn.{letter}_proj.bias", f"{ours}b{letter}", HEADS_BIAS),
        ]
    rules += [
        Rule(f"{layer}self_attn.out_proj.weight", f"{ours}wo", HEADS_IN),
        Rule(f"{layer}self_attn.out_proj.bias", f"{ours}bo"),
    ]
    return tuple(rules)


RULES = (
    Rule("embeddings.patch_embedding.weight", "encoder.patch_embedding", PATCH),
    Rule("embeddings.patch_embedding.bias", "encoder.patch_bias"),
    Rule("embeddings.position_embedding.weight", "encoder.position_embedding"),
    *_layer_rules(),
    Rule("post_layernorm.weight", "encoder.post_norm_scale"),
    Rule("post_layernorm.bias", "encoder.post_norm_bias"),
)


def _block(name: str, ours: str, transform: Transform = IDENTITY) -> Rule:
    return Rule(f"params/img/Transformer/encoderblock_{{i}}/{name}", f"encoder.layers.{ours}", transform)


_ATTENTION = "MultiHeadDotProductAttention_0"
# big_vision's kernels are [in, out], those of attention [in, N, H] and [N, H, out], as ours are.
BIG_VISION_RULES = (
    Rule("params/img/embedding/kernel", "encoder.patch_embedding", IMAGE_KERNEL),
    Rule("params/img/embedding/bias", "encoder.patch_bias"),
    Rule("params/img/pos_embedding", "encoder.position_embedding", BATCH),
    *(
        _block(f"LayerNorm_{number}/{name}", f"norm{number + 1}_{name}")
        for number in (0, 1)
        for name in ("scale", "bias")
    ),
    *(
        _block(f"{_ATTENTION}/{name}/{kind}", f"{letter}{name[0]}")
        for name in ("query", "key", "value", "out")
        for kind, letter in (("kernel", "w"), ("bias", "b"))
    ),
    *(
        _block(f"MlpBlock_0/Dense_{number}/{kind}", f"{letter}{number + 1}")
        for number in (0, 1)
        for kind, letter in (("kernel", "w"), ("bias", "b"))
    ),
    Rule("params/img/Transformer/encoder_norm/scale", "encoder.post_norm_scale"),
    Rule("params/img/Transformer/encoder_norm/bias", "encoder.post_norm_bias"),
)


def _layers_from(depth: int) -> str:
    """A pattern that matches whole numbers of at least `depth`."""
    below = "|".join(str(number) for number in range(depth))
    return rf"(?!(?:{below})(?!\d))\d+"


def ignored(config: ModelConfig) -> tuple[Ignored, ...]:
    """Tensors that a source of the vision tower may hold beside those of `RULES`."""
    above = f"above the layer that features are read from (the first {config.vision.depth} are kept)"
    prefix = PREFIX.replace(".", r"\.")
    return (
        Ignored(rf"{prefix}head\.", HEAD),
        Ignored(rf"{prefix}encoder\.layers\.{_layers_from(config.vision.depth)}\.", above),
        Ignored(rf"{prefix}embeddings\.position_ids$", "computed, not learnt"),
        Ignored(r"text_model\.", TEXT),
        Ignored(r"logit_(scale|bias)$", "of the contrastive loss"),
    )


def big_vision_ignored(config: ModelConfig) -> tuple[Ignored, ...]:
    """Arrays that a big_vision file may hold beside those of `BIG_VISION_RULES`."""
    above = f"above the layer that features are read from (the first {config.vision.depth} are kept)"
    blocks = rf"params/img/Transformer/encoderblock_{_layers_from(config.vision.depth)}/"
    return (
        Ignored(r"params/img/(MAPHead_0|head)/", HEAD),
        Ignored(blocks, above),
        Ignored(r"params/txt/", TEXT),
        Ignored(r"params/(t|b)$", "of the contrastive loss"),
        Ignored(r"opt/", "state of the optimiser"),
    )
