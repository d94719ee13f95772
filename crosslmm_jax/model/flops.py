"""Floating-point operations of each part, counted from the sizes alone.

What counts as model FLOPs:

- matrix products only; a multiplication with its addition is 2,
- each query-key pair that may be read, once: half a square for causal attention,
- nothing that a backend computes besides: no recomputation, no masked pairs.

`dense=True` also counts masked pairs, for a program that computes all scores and masks some. The compiler's
`cost_analysis` of the reference backend counts the same.
"""

from collections.abc import Mapping
from typing import NamedTuple

from crosslmm_jax.config import PARTS, ModelConfig

# `jax.Device.device_kind` -> 10^12 dense bfloat16 FLOPs per second of one `jax.Device`, by its maker's data
# sheet. Clocks fall below those of the data sheet under load, so that no program reaches it.
PEAK_TFLOPS = {
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA GH200 480GB": 989.0,
    "NVIDIA B200": 2250.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


ALL_LEARN: Mapping[str, float] = dict.fromkeys(PARTS, 1.0)  # part -> share of its weights that learn


class Workload(NamedTuple):
    """One row: `before` text tokens, a video, then the rest of the text."""

    frames: int
    text: int  # text tokens, including those before the video
    before: int = 0

    def length(self, config: ModelConfig) -> int:
        """T, the tokens of the sequence."""
        return self.text + self.frames * config.merge.tokens_per_frame


class Cost(NamedTuple):
    """FLOPs of one part in the forward pass."""

    weights: float = 0.0  # activations times weights
    products: float = 0.0  # activations times activations: scores, and probabilities times values

    @property
    def total(self) -> float:
        """Both kinds."""
        return self.weights + self.products


Costs = dict[str, Cost]


def total(costs: Costs) -> float:
    """FLOPs of all parts."""
    return sum(cost.total for cost in costs.values())


def encoder(config: ModelConfig, frames: int) -> Costs:
    """Costs of encoder, pool and projector.

    The projector projects pooled tokens, and original tokens if a layer reads them.
    """
    v, m, width = config.vision, config.merge, config.decoder.width
    patches, tokens = v.num_patches, frames * v.num_patches
    embedding = 2 * tokens * 3 * v.patch_size**2 * v.width
    layer = Cost(tokens * (8 * v.width**2 + 4 * v.width * v.mlp_width), 4 * tokens * patches * v.width)
    projected = frames * m.tokens_per_frame
    if config.cross_attention.kv_source == "projected" and config.cross_attention.directions:
        projected += tokens
    return {
        "encoder": Cost(embedding + v.depth * layer.weights, v.depth * layer.products),
        "pool": Cost(products=2 * m.tokens_per_frame * tokens * v.width),
        "projector": Cost(2 * projected * width * (v.width + width)),
    }


def frame_pairs(config: ModelConfig, frames: int, *, dense: bool = False) -> int:
    """Pairs of a frame and a frame that its compact tokens attend to in V2V."""
    cross = config.cross_attention
    if cross.v2v_scope == "video":
        return frames**2
    if cross.v2v_scope == "frame":
        return frames
    window = min(cross.v2v_window, frames)
    if dense:  # each block of `window` frames attends to three blocks
        return -(-frames // window) * window * 3 * window
    return sum(min(f + window, frames - 1) - max(f - window, 0) + 1 for f in range(frames))


def v2v(config: ModelConfig, frames: int, *, dense: bool = False) -> Costs:
    """V2V in all its layers: K/V of the original tokens; attention with query and output projection."""
    c = config.merge.tokens_per_frame
    attended = frame_pairs(config, frames, dense=dense) * c * config.vision.num_patches
    return {
        "v2v_kv": _keys_values(config, frames),
        "v2v": _cross(config, queries=frames * c, pairs=attended),
    }


def t2v(config: ModelConfig, work: Workload, *, dense: bool = False) -> Costs:
    """T2V in all its layers, as `v2v`. Text tokens before the video attend to nothing."""
    readers = work.text if dense else work.text - work.before
    pairs = readers * work.frames * config.vision.num_patches
    return {
        "t2v_kv": _keys_values(config, work.frames),
        "t2v": _cross(config, queries=work.text, pairs=pairs),
    }


def _keys_values(config: ModelConfig, frames: int) -> Cost:
    projected = config.cross_attention.kv_source == "projected"
    width = config.decoder.width if projected else config.vision.width
    kv = 2 * config.decoder.num_kv_heads * config.decoder.head_dim
    layers = len(config.cross_attention_layers)
    return Cost(layers * 2 * frames * config.vision.num_patches * width * kv)


def _cross(config: ModelConfig, *, queries: int, pairs: int) -> Cost:
    d, layers = config.decoder, len(config.cross_attention_layers)
    heads = d.num_heads * d.head_dim
    return Cost(layers * 4 * queries * d.width * heads, layers * 4 * pairs * heads)


def decoder(config: ModelConfig, *, queries: int, pairs: int, logits: int) -> Costs:
    """Self-attention, MLP and output head.

    Args:
      config: the model configuration.
      queries: tokens that run through the layers.
      pairs: pairs of a token and a token that it attends to.
      logits: positions whose logits are computed.
    """
    d = config.decoder
    heads, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    attention = Cost(queries * 4 * d.width * (heads + kv), 4 * pairs * heads)
    return {
        "self_attention": Cost(d.num_layers * attention.weights, d.num_layers * attention.products),
        "mlp": Cost(d.num_layers * 6 * queries * d.width * d.mlp_width),
        "head": Cost(2 * logits * d.width * d.vocab_size),
    }


def causal_pairs(length: int, *, dense: bool = False) -> int:
    """Pairs of a token and a token that it attends to, including itself."""
    return length**2 if dense else length * (length + 1) // 2


def prefill(config: ModelConfig, work: Workload, *, dense: bool = False, logits: int = 1) -> Costs:
    """One row from pixels and tokens to the logits of `logits` positions."""
    length = work.length(config)
    costs = encoder(config, work.frames)
    if "v2v" in config.cross_attention.directions:
        costs |= v2v(config, work.frames, dense=dense)
    if "t2v" in config.cross_attention.directions:
        costs |= t2v(config, work, dense=dense)
    pairs = causal_pairs(length, dense=dense)
    return costs | decoder(config, queries=length, pairs=pairs, logits=logits)


def decode(config: ModelConfig, *, frames: int, cached: int) -> Costs:
    """One generated token after `cached` tokens, with T2V's KV cache of the video filled."""
    costs = decoder(config, queries=1, pairs=cached + 1, logits=1)
    if "t2v" in config.cross_attention.directions:
        costs["t2v"] = _cross(config, queries=1, pairs=frames * config.vision.num_patches)
    return costs


def train(
    config: ModelConfig,
    work: Workload,
    *,
    targets: int,
    learns: Mapping[str, float] = ALL_LEARN,
    adapters: Mapping[str, int] | None = None,
    dense: bool = False,
) -> Costs:
    """Forward and backward pass of one row, without recomputation.

    The backward pass of a product with weights costs the forward once for the gradient of its input and once
    for that of the weights; that of a product of activations costs it twice. No gradient is computed below
    the first part that learns, nor for frozen weights.

    Args:
      config: the model configuration, with the directions of the stage.
      work: the row.
      targets: positions whose logits are computed.
      learns: part -> share of its weights that learn, for those of which some do.
      adapters: matrix, such as "v2v.wk" -> parameters of its adapters in all layers (LoRA).
      dense: count masked pairs too.
    """
    part_of = {
        "encoder": "encoder", "pool": "", "projector": "projector", "v2v_kv": "v2v", "v2v": "v2v",
        "t2v_kv": "t2v", "t2v": "t2v", "self_attention": "decoder", "mlp": "decoder", "head": "decoder",
    }  # fmt: skip
    forward = prefill(config, work, dense=dense, logits=targets)
    below = {"encoder": False, "pool": "encoder" in learns, "projector": "encoder" in learns}
    visual_learns = bool({"encoder", "projector"} & learns.keys())
    costs = {}
    for part, cost in forward.items():
        passes_on = below.get(part, visual_learns if part.endswith("_kv") else True)
        weights = 1 + learns.get(part_of[part], 0) + passes_on
        products = 1 + 2 * (passes_on or part_of[part] in learns)
        costs[part] = Cost(weights * cost.weights, products * cost.products)
    if "projector" in learns and "encoder" not in learns:  # its first matrix passes no gradient on
        second = config.decoder.width / (config.vision.width + config.decoder.width)
        costs["projector"] = Cost((1 + learns["projector"] + second) * forward["projector"].weights)
    costs["pool"] = Cost(products=forward["pool"].products * (1 + ("encoder" in learns)))
    if "encoder" in learns:  # gradients of the layers' inputs, but not of the pixels
        pixels = 2 * work.frames * config.vision.num_patches * 3 * config.vision.patch_size**2
        below_layers = pixels * config.vision.width
        layers = forward["encoder"].weights - below_layers
        share = learns["encoder"]
        costs["encoder"] = Cost(
            (1 + share) * below_layers + (2 + share) * layers, 3 * forward["encoder"].products
        )
    if adapters:
        costs["lora"] = Cost(3 * _adapters(config, work, adapters))
    return costs


def _adapters(config: ModelConfig, work: Workload, sizes: Mapping[str, int]) -> float:
    """FLOPs of adapters in the forward pass: of each, its parameters times the tokens that it reads."""
    originals, compact = work.frames * config.vision.num_patches, work.frames * config.merge.tokens_per_frame
    queries = {"decoder": work.length(config), "v2v": compact, "t2v": work.text}

    def tokens(name: str) -> int:
        part, matrix = name.split(".")[0], name.split(".")[-1]
        return originals if part != "decoder" and matrix in ("wk", "wv") else queries[part]

    return sum(2.0 * tokens(name) * size for name, size in sizes.items())


def peak_tflops(device_kind: str, config: ModelConfig) -> float | None:
    """10^12 FLOPs per second of a device at most, if that is known and holds for the compute dtype."""
    return PEAK_TFLOPS.get(device_kind) if config.compute_dtype == "bfloat16" else None
