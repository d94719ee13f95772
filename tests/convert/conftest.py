"""Tiny random checkpoints of every layout, as the projects that they come from write them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers

from crosslmm_jax.demo.tokenizer import write_default_tokenizer

VISION = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "use_sliding_window": False,
}  # fmt: skip
PADDED = 576  # rows that Hugging Face gives a LLaVA with 512
LAYOUTS = ("original", "hf", "hf_4_52", "hf_5")


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Norms at 1 and biases at 0 would hide a forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir(parents=True)
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tower() -> torch.nn.Module:
    torch.manual_seed(0)
    return randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)), 0)


def language_model(tied: bool) -> torch.nn.Module:
    torch.manual_seed(1)
    config = transformers.Qwen2Config(**TEXT, tie_word_embeddings=tied)
    return randomised(transformers.Qwen2ForCausalLM(config), 1)


def llava_tensors() -> dict[str, torch.Tensor]:
    """The tower without its last layer and head, the decoder, a projector and image_newline."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"vision_tower.vision_model.{name}": value for name, value in tower().state_dict().items()
        if "head." not in name and "layers.2." not in name
    }  # fmt: skip
    shapes = {"0.weight": (64, 48), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    for name, shape in shapes.items():
        tensors[f"mm_projector.{name}"] = torch.randn(shape, generator=generator)
    tensors |= language_model(tied=False).state_dict()
    tensors["image_newline"] = torch.randn(64, generator=generator)
    return {name: value.half() for name, value in tensors.items()}


def original_name(name: str) -> str:
    prefixes = {"vision_tower.": "model.vision_tower.", "mm_projector.": "model.", "image_newline": "model."}
    return next((new for old, new in prefixes.items() if name.startswith(old)), "") + name


def hf_name(name: str) -> str:
    if name.startswith("mm_projector."):
        layer, kind = name.split(".")[1:]
        return f"multi_modal_projector.linear_{1 if layer == '0' else 2}.{kind}"
    return f"language_model.{name}" if name.startswith(("model.", "lm_head.")) else name


def hf_4_52_name(name: str) -> str:
    if name == "lm_head.weight":
        return name
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return f"model.{hf_name(name)}"


def hf_5_name(name: str) -> str:
    return hf_name(name).replace("vision_model.", "")


def llava_config(layout: str) -> dict:
    text = transformers.Qwen2Config(**TEXT, tie_word_embeddings=False).to_dict()
    if layout == "original":
        return text | {
            "model_type": "llava", "mm_vision_tower": "somewhere/tiny-tower", "mm_hidden_size": 48,
            "mm_projector_type": "mlp2x_gelu", "rope_theta": 5e4,
        }  # fmt: skip
    vision = {**VISION, "num_hidden_layers": 2, "model_type": "siglip_vision_model"}
    return {
        "model_type": "llava_onevision", "tie_word_embeddings": False, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "text_config": text | {"vocab_size": PADDED},
        "vision_config": vision,
    }  # fmt: skip


def save_llava(folder: Path, layout: str) -> Path:
    rename = {"original": original_name, "hf": hf_name, "hf_4_52": hf_4_52_name, "hf_5": hf_5_name}[layout]
    tensors = llava_tensors()
    if layout != "original":
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            extra = torch.ones(PADDED - 512, 64, dtype=torch.float16)
            tensors[name] = torch.cat([tensors[name], extra])
    return save(folder, {rename(name): value for name, value in tensors.items()}, llava_config(layout))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders: tokenizer, vision, two_tower, tied, untied, and llava[layout]."""
    root = tmp_path_factory.mktemp("sources")
    write_default_tokenizer(root / "tokenizer", 512)
    vision = tower()
    vision.save_pretrained(root / "vision")
    text = transformers.SiglipTextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=50,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    both = transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.config.to_dict())
    two_tower = randomised(transformers.SiglipModel(both), 3)
    two_tower.save_pretrained(root / "two_tower")
    for name in ("tied", "untied"):
        model = language_model(tied=name == "tied").to(torch.bfloat16)
        # Small shards, so that there is an index.
        model.save_pretrained(root / name, max_shard_size="100KB" if name == "untied" else "1GB")
    llava = {layout: save_llava(root / "llava" / layout, layout) for layout in LAYOUTS}
    return SimpleNamespace(
        root=root, tokenizer=root / "tokenizer", vision=root / "vision", two_tower=root / "two_tower",
        tied=root / "tied", untied=root / "untied", llava=llava,
    )  # fmt: skip


@pytest.fixture(scope="session")
def load_tensors():
    """`load_tensors(folder)`: all tensors of a safetensors folder by name, as torch tensors."""

    def load(folder: Path) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= safetensors.torch.load_file(file)
        return tensors

    return load


@pytest.fixture(scope="session")
def bit_equal():
    """`bit_equal(a, b)`: same type, shape and bits."""

    def bits(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(bits(a), bits(b))

    return equal
