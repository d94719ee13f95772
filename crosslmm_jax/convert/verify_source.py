"""Runs the source of a conversion in PyTorch in float32, block by block.

The models are Hugging Face's classes. The weights of a block are read just before it runs and dropped after
it, so that a source of any size and layout needs only the memory of its largest block.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crosslmm_jax.config import ModelConfig, VisionConfig
from crosslmm_jax.convert.families.llava import canonical
from crosslmm_jax.convert.source.files import Source
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import read_json

if TYPE_CHECKING:
    import torch
    import transformers

Blocks = dict[str, np.ndarray]
# Buffers that old checkpoints hold although they are computed.
_COMPUTED = ("position_ids", "rotary_emb.inv_freq")
TOWER, PROJECTOR = "vision_model.", "multi_modal_projector."


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


class Tensors:
    """The tensors of one or several sources under the names of an export."""

    def __init__(self, sources: Iterable[Source]) -> None:
        """A later source takes precedence over earlier ones."""
        sources = list(sources)
        self._paths = ", ".join(str(source.path) for source in sources)
        self._where = {canonical(name): (source, name) for source in sources for name in source.tensors}

    def names(self, prefix: str) -> list[str]:
        """The names below `prefix`, with the prefix removed."""
        below = [name[len(prefix) :] for name in self._where if name.startswith(prefix)]
        return [name for name in below if not name.endswith(_COMPUTED)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`. Raises a `UserError` when no source has it."""
        if name not in self._where:
            raise UserError(f"{self._paths}: no tensor {name}; give the source of this MODEL, complete")
        source, original = self._where[name]
        return source.tensors[original].shape

    def read(self, prefix: str) -> "dict[str, torch.Tensor]":
        """float32 torch tensors of all names below `prefix`."""
        import torch

        values = {}
        for name in self.names(prefix):
            source, original = self._where[prefix + name]
            values[name] = torch.from_numpy(np.array(source.read(original), np.float32))
        return values

    def path(self, prefix: str) -> Path:
        """The path of the source that holds the tensors below `prefix`."""
        return next(source.path for name, (source, _) in self._where.items() if name.startswith(prefix))


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
        decoder = _decoder_config(folders)
        # A head beside a tied embedding is not read by Hugging Face; LLaVA's two configs may disagree on it.
        tied = decoder.tie_word_embeddings and "--llm" in folders
        return blocks | _decoder_blocks(tensors, decoder, tokens, tied=tied)


def _vision_config(folders: Mapping[str, Path], vision: VisionConfig) -> "transformers.SiglipVisionConfig":
    import transformers

    folder = folders.get("--llava", folders.get("--vision"))
    stored = read_json(Path(str(folder)) / "config.json")
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

    stored = read_json(folders.get("--llava", folders.get("--llm", Path())) / "config.json")
    return transformers.Qwen2Config(**stored.get("text_config", stored))


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
    hidden = F.gelu(F.linear(torch.from_numpy(features), w["linear_1.weight"], w["linear_1.bias"]))
    return F.linear(hidden, w["linear_2.weight"], w["linear_2.bias"]).numpy()


def _decoder_blocks(
    tensors: Tensors, config: "transformers.Qwen2Config", tokens: np.ndarray, *, tied: bool
) -> Blocks:
    import torch
    import transformers

    # The embedding's rows are counted: LLaVA's config and its tensors may disagree on the padding.
    config.vocab_size = tensors.shape("model.embed_tokens.weight")[0]
    head = "lm_head." if tensors.names("lm_head.") and not tied else "model.embed_tokens."
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
                f"{tensors.path('')}: {error}; give the source of this MODEL, complete"
            ) from error

    def drop(module: "torch.nn.Module", args: object, output: Any) -> None:
        keep(output)
        module.to("meta")

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)
