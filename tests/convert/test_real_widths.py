"""At the widths of the released models, float32, few layers: what was converted computes what torch does.

Those of crosslmm_2b on every change; those that the larger presets add are nightly.
"""

import gc

import jax
import numpy as np
import pytest
import torch
import transformers

from crosslmm_jax import presets
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.model import CrossLMM
from crosslmm_jax.model.encoder import SiglipEncoder
from crosslmm_jax.model_folder import load_model_config, load_weights

pytestmark = pytest.mark.slow
FLOAT32 = ("--compute-dtype", "float32")
ROWS = 1024  # of the vocabulary: its size changes nothing but the time


def widened(module: torch.nn.Module) -> torch.nn.Module:
    """Norms and biases away from 1 and 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        pytest.param("so400m", {"-2": "False", "-1": "True"}, id="so400m"),
        pytest.param("giant_opt", {"-2": "False"}, id="giant_opt", marks=pytest.mark.nightly),
    ],
)
def test_siglip(sources, tmp_path, name, choices) -> None:
    """`choices`: feature layer -> whether the last layernorm is a part of the features."""
    sizes = getattr(presets, name)()
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=sizes.width, intermediate_size=sizes.mlp_width, num_hidden_layers=2,
        num_attention_heads=sizes.num_heads, image_size=sizes.image_size, patch_size=sizes.patch_size,
    )  # fmt: skip
    model = widened(transformers.SiglipVisionModel(config))
    model.save_pretrained(tmp_path / "vision")
    frames = np.random.default_rng(0).integers(0, 256, (1, 384, 384, 3), dtype=np.uint8)
    with torch.no_grad():
        out = model(torch.tensor(frames).permute(0, 3, 1, 2) / 127.5 - 1, output_hidden_states=True)
    expected = {"-2": out.hidden_states[-2], "-1": out.last_hidden_state}
    for layer, choice in choices.items():
        overrides = (*FLOAT32, "--vision.feature-layer", layer, "--vision.post-layernorm", choice)
        request = Request(vision=str(tmp_path / "vision"), llm=str(sources.tied), overrides=overrides)
        convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
        converted = load_model_config(tmp_path / "model")
        params = load_weights(tmp_path / "model", converted, dtype="float32")["encoder"]
        features = jax.jit(SiglipEncoder(converted.vision, "float32", "blockwise").apply)(
            {"params": params}, frames
        )
        np.testing.assert_allclose(features, expected[layer], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        pytest.param("crosslmm_2b", 2, id="crosslmm_2b"),
        pytest.param("crosslmm_7b", 1, id="crosslmm_7b", marks=pytest.mark.nightly),
    ],
)
def test_qwen2(sources, tmp_path, make_batch, name, layers) -> None:
    sizes = presets.get_preset(name).decoder
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=ROWS, hidden_size=sizes.width, intermediate_size=sizes.mlp_width, num_hidden_layers=layers,
        num_attention_heads=sizes.num_heads, num_key_value_heads=sizes.num_kv_heads, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=32768,
        tie_word_embeddings=sizes.tie_embeddings,
    )  # fmt: skip
    model = widened(transformers.Qwen2ForCausalLM(config))
    model.save_pretrained(tmp_path / "llm")
    request = Request(vision=str(sources.vision), llm=str(tmp_path / "llm"), overrides=FLOAT32)
    convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    converted = load_model_config(tmp_path / "model")
    batch = make_batch(converted, frames=0, text=24)
    with torch.no_grad():
        expected = model(torch.tensor(batch.tokens, dtype=torch.long)).logits.numpy()
    del model
    gc.collect()
    params = load_weights(tmp_path / "model", converted)
    logits = jax.jit(CrossLMM(converted).apply)({"params": params}, batch)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
