"""Runs the source of a conversion in PyTorch in float32, block by block.

The models are Hugging Face's classes. The weights of a block are read just before it runs and dropped after
it, so that a source of any size and layout needs only the memory of its largest block.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crosslmm_jax.config import ModelConfig, VisionConfig
from crosslmm_jax.convert.verify_tensors import Tensors
from crosslmm_jax.errors import UserError

if TYPE_CHECKING:
    import torch
    import transformers

Blocks = dict[str, np.ndarray]
TOWER, PROJECTOR = "vision_model.", "projector."


def require_torch() -> None:
    """Raises a `UserError` that names the extra to install when torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"convert verify runs the source in PyTorch and {error.name} is not installed;"
            " pip install 'crosslmm_jax[test]'"
        ) from error


def source_blocks(
    tensors: Tensors,
    config: ModelConfig,
    folders: Mapping[str, Path],
    *,
    pixels: np.ndarray,
    tokens: np.ndarray,
) -> Blocks:
    """The outputs of every block of the source.

    Args:
      tensors: of the source.
      config: of the converted model, for the depth of the tower and for sizes that the source does not state.
      folders: option ("--vision", "--llm" or "--llava") -> folder with its config.json.
      pixels: float32[n, R, R, 3], normalised.
      tokens: int32[B, T].

    Raises:
      UserError: a block's tensors are missing, too many or of another shape.
    """
    import torch

    with torch.no_grad():
        blocks = _vision_blocks(tensors, config, _vision_config(folders, config.vision), pixels)
        if tensors.names(PROJECTOR):
            blocks["projector"] = _project(tensors, blocks["features"])
        return blocks | _decoder_blocks(tensors, _decoder_config(folders), tokens)


def _vision_config(folders: Mapping[str, Path], vision: VisionConfig) -> "transformers.SiglipVisionConfig":
    import transformers

    folder = folders.get("--llava", folders.get("--vision"))
    stored = _read_config(Path(str(folder)))
    if "vision_config" in stored:
        return transformers.SiglipVisionConfig(**stored["vision_config"])
    if "--llava" not in folders:
        return transformers.SiglipVisionConfig(**stored)
    # The original LLaVA layout names its tower without sizes. Tensors of other sizes fail when they are read.
    return transformers.SiglipVisionConfig(
        hidden_size=vision.width, intermediate_size=vision.mlp_width, num_attention_heads=vision.num_heads,
        image_size=vision.image_size, patch_size=vision.patch_size, layer_norm_eps=vision.layer_norm_eps,
    )  # fmt: skip


def _decoder_config(folders: Mapping[str, Path]) -> "transformers.Qwen2Config":
    import transformers

    stored = _read_config(folders.get("--llava", folders.get("--llm", Path())))
    return transformers.Qwen2Config(**stored.get("text_config", stored))


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def normalised(frames: np.ndarray, folder: Path) -> np.ndarray:
    """uint8[n, R, R, 3] as the image processor of a source's `folder` normalises them, float32."""
    import transformers

    settings = {}
    for name in ("processor_config.json", "preprocessor_config.json"):  # the last one that is there
        if (folder / name).is_file():
            stored = json.loads((folder / name).read_text(encoding="utf-8"))
            settings = stored.get("image_processor", stored)
    known = {name: settings[name] for name in ("image_mean", "image_std") if name in settings}
    processor = transformers.SiglipImageProcessor(**known)
    mean, std = (np.array(x, np.float32) for x in (processor.image_mean, processor.image_std))
    return (frames.astype(np.float32) / np.float32(255) - mean) / std


def _vision_blocks(
    tensors: Tensors, ours: ModelConfig, config: "transformers.SiglipVisionConfig", pixels: np.ndarray
) -> Blocks:
    import torch
    import transformers

    # Hugging Face's hidden_states[depth]: neither the layers above nor the attention-pooling head run.
    config.num_hidden_layers, config.vision_use_head = ours.vision.depth, False
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(config).eval()
    tower: Any = getattr(model, "vision_model", model)
    tower.embeddings.position_ids = torch.arange(tower.embeddings.position_embedding.weight.shape[0])[None]
    blocks: Blocks = {}
    _stream(tower.embeddings, tensors, f"{TOWER}embeddings.", _keep(blocks, "patch embedding"))
    for i, layer in enumerate(tower.encoder.layers):
        _stream(layer, tensors, f"{TOWER}encoder.layers.{i}.", _keep(blocks, f"encoder layer {i}"))
    _stream(tower.post_layernorm, tensors, f"{TOWER}post_layernorm.", _keep(blocks, "features"))
    model(pixel_values=torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))
    if not ours.vision.post_layernorm:
        blocks["features"] = blocks[f"encoder layer {ours.vision.depth - 1}"]
    return blocks


def _project(tensors: Tensors, features: np.ndarray) -> np.ndarray:
    """LLaVA's `mlp2x_gelu`."""
    import torch
    from torch.nn import functional as F

    w = tensors.read(PROJECTOR)
    hidden = F.gelu(F.linear(torch.from_numpy(features), w["1.weight"], w["1.bias"]))
    return F.linear(hidden, w["2.weight"], w["2.bias"]).numpy()


def _decoder_blocks(tensors: Tensors, config: "transformers.Qwen2Config", tokens: np.ndarray) -> Blocks:
    import torch
    import transformers

    # The embedding's rows are counted: LLaVA's config and its tensors may disagree on the padding.
    config.vocab_size = tensors.rows("model.embed_tokens.weight")
    # Whatever config.json says about tying, transformers keeps a head that differs from the embedding.
    head = "lm_head." if tensors.names("lm_head.") else "model.embed_tokens."
    config.tie_word_embeddings = False  # each use reads its own copy
    with torch.device("meta"):
        model: Any = transformers.Qwen2ForCausalLM(config).eval()
    # Its frequencies are computed in the constructor, which computes nothing on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    blocks: Blocks = {}
    _stream(model.model.embed_tokens, tensors, "model.embed_tokens.", _keep(blocks, "token embedding"))
    for i, layer in enumerate(model.model.layers):
        _stream(layer, tensors, f"model.layers.{i}.", _keep(blocks, f"decoder layer {i}"))
    _stream(model.model.norm, tensors, "model.norm.", _keep(blocks, "final norm"))
    _stream(model.lm_head, tensors, head, _keep(blocks, "logits"))
    model(input_ids=torch.from_numpy(tokens.astype(np.int64)), use_cache=False)
    return blocks


def _keep(blocks: Blocks, name: str) -> Callable[[Any], None]:
    def keep(output: "torch.Tensor | tuple[torch.Tensor, ...]") -> None:
        value = output[0] if isinstance(output, tuple) else output
        blocks[name] = value.numpy()

    return keep


def _stream(module: "torch.nn.Module", tensors: Tensors, prefix: str, keep: Callable[[Any], None]) -> None:
    """Makes `module` read its weights before it is called, and drop them afterwards."""

    def fill(module: "torch.nn.Module", args: object) -> None:
        try:
            module.load_state_dict(tensors.read(prefix), strict=True, assign=True)
        except RuntimeError as error:
            raise UserError(
                f"{tensors.path(prefix) or 'the source'}: {error}; give the source of this MODEL, complete"
            ) from error

    def drop(module: "torch.nn.Module", args: object, output: Any) -> None:
        keep(output)
        module.to("meta")

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)
