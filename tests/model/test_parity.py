"""Encoder and decoder against Hugging Face's torch models with random weights, gradients too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from crosslmm_jax.model import CrossLMM, init_params
from crosslmm_jax.model.encoder import SiglipEncoder


def stacked(layers: list, fields: dict) -> dict:
    """`fields` maps our name to a function of one torch layer; the results are stacked over layers."""
    return {name: np.stack([get(layer).detach().numpy() for layer in layers]) for name, get in fields.items()}


def randomise(module: torch.nn.Module) -> None:
    """Hugging Face starts norms at 1 and biases at 0, which would hide a forgotten one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def siglip_params(model, width: int, heads: int) -> dict:
    size = width // heads
    vision = model.vision_model if hasattr(model, "vision_model") else model
    into = {f"w{n}": (f"{n}_proj", lambda w: w.T.reshape(width, heads, size)) for n in "qkv"}
    fields = {
        ours: lambda layer, name=name, f=f: f(getattr(layer.self_attn, name).weight)
        for ours, (name, f) in into.items()
    }
    fields |= {
        f"b{n}": lambda layer, n=n: getattr(layer.self_attn, f"{n}_proj").bias.reshape(heads, size)
        for n in "qkv"
    }
    fields |= {
        "wo": lambda layer: layer.self_attn.out_proj.weight.T.reshape(heads, size, width),
        "bo": lambda layer: layer.self_attn.out_proj.bias,
        "w1": lambda layer: layer.mlp.fc1.weight.T, "b1": lambda layer: layer.mlp.fc1.bias,
        "w2": lambda layer: layer.mlp.fc2.weight.T, "b2": lambda layer: layer.mlp.fc2.bias,
    }  # fmt: skip
    for i in (1, 2):
        fields[f"norm{i}_scale"] = lambda layer, i=i: getattr(layer, f"layer_norm{i}").weight
        fields[f"norm{i}_bias"] = lambda layer, i=i: getattr(layer, f"layer_norm{i}").bias
    embeddings = vision.embeddings
    kernel = embeddings.patch_embedding.weight.detach().numpy()  # [W, 3, p, p]
    return {
        "patch_embedding": np.einsum("wchv->hvcw", kernel).reshape(-1, width),
        "patch_bias": embeddings.patch_embedding.bias.detach().numpy(),
        "position_embedding": embeddings.position_embedding.weight.detach().numpy(),
        "layers": stacked(list(vision.encoder.layers), fields),
        "post_norm_scale": vision.post_layernorm.weight.detach().numpy(),
        "post_norm_bias": vision.post_layernorm.bias.detach().numpy(),
    }


@pytest.mark.parametrize("feature_layer,post_layernorm", [(-2, False), (-1, True), (-1, False)])
def test_siglip_features_equal_torch(tiny_config, feature_layer, post_layernorm):
    vision = dataclasses.replace(
        tiny_config.vision, image_size=38, patch_size=8, feature_layer=feature_layer,
        post_layernorm=post_layernorm,
    )  # fmt: skip
    config = transformers.SiglipVisionConfig(
        hidden_size=vision.width, intermediate_size=vision.mlp_width, num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads, image_size=38, patch_size=8, vision_use_head=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.SiglipVisionModel(config).eval()
    randomise(model)
    frames = np.random.default_rng(0).integers(0, 256, (3, 38, 38, 3), dtype=np.uint8)
    pixels = torch.tensor(frames).permute(0, 3, 1, 2) / 127.5 - 1
    out = model(pixel_values=pixels, output_hidden_states=True)
    expected = out.last_hidden_state if post_layernorm else out.hidden_states[feature_layer]
    params = siglip_params(model, vision.width, vision.num_heads)
    params["layers"] = {name: value[: vision.depth] for name, value in params["layers"].items()}
    encoder = SiglipEncoder(vision, "float32", "blockwise")
    ours = encoder.apply({"params": params}, frames)
    np.testing.assert_allclose(ours, expected.detach(), atol=2e-5)


def qwen_params(model, config) -> dict:
    D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim
    fields = {
        "attn_norm": lambda layer: layer.input_layernorm.weight,
        "wq": lambda layer: layer.self_attn.q_proj.weight.T.reshape(D, N, H),
        "bq": lambda layer: layer.self_attn.q_proj.bias.reshape(N, H),
        "wk": lambda layer: layer.self_attn.k_proj.weight.T.reshape(D, K, H),
        "bk": lambda layer: layer.self_attn.k_proj.bias.reshape(K, H),
        "wv": lambda layer: layer.self_attn.v_proj.weight.T.reshape(D, K, H),
        "bv": lambda layer: layer.self_attn.v_proj.bias.reshape(K, H),
        "wo": lambda layer: layer.self_attn.o_proj.weight.T.reshape(N, H, D),
        "mlp_norm": lambda layer: layer.post_attention_layernorm.weight,
        "w_gate": lambda layer: layer.mlp.gate_proj.weight.T,
        "w_up": lambda layer: layer.mlp.up_proj.weight.T,
        "w_down": lambda layer: layer.mlp.down_proj.weight.T,
    }
    params = {
        "embedding": model.model.embed_tokens.weight.detach().numpy(),
        "layers": stacked(list(model.model.layers), fields),
        "final_norm": model.model.norm.weight.detach().numpy(),
    }
    if not config.tie_embeddings:
        params["lm_head"] = model.lm_head.weight.T.detach().numpy()
    return params


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False])
def test_qwen2_logits_and_gradients_equal_torch(tiny_config, replace_config, make_batch, tie):
    config = replace_config(tiny_config, decoder={"tie_embeddings": tie}, cross_attention={"directions": ()})
    decoder = config.decoder
    torch.manual_seed(2)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=decoder.vocab_size, hidden_size=decoder.width, intermediate_size=decoder.mlp_width,
            num_hidden_layers=decoder.num_layers, num_attention_heads=decoder.num_heads,
            num_key_value_heads=decoder.num_kv_heads, rms_norm_eps=decoder.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
            tie_word_embeddings=tie, use_sliding_window=False,
        )
    ).eval()  # fmt: skip
    randomise(model)
    params = init_params(config, jax.random.key(0)) | {"decoder": qwen_params(model, decoder)}
    batch = make_batch(config, frames=0, text=11)
    batch = batch._replace(loss_mask=np.ones_like(batch.loss_mask))
    theirs = model(torch.tensor(batch.tokens, dtype=torch.long)).logits
    loss = torch.nn.functional.cross_entropy(
        theirs[:, :-1].reshape(-1, decoder.vocab_size),
        torch.tensor(batch.tokens[:, 1:], dtype=torch.long).reshape(-1),
        reduction="sum",
    )
    loss.backward()

    def our_loss(decoder_params):
        variables = {"params": params | {"decoder": decoder_params}}
        loss = CrossLMM(config).apply(variables, batch, method="loss")[0]
        return loss, CrossLMM(config).apply(variables, batch)

    (value, ours), gradients = jax.jit(jax.value_and_grad(our_loss, has_aux=True))(params["decoder"])
    np.testing.assert_allclose(ours, theirs.detach(), atol=5e-5)
    np.testing.assert_allclose(value, loss.detach(), rtol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
    expected = qwen_params(model, decoder)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3), gradients, expected)


def test_the_projector_is_an_exact_gelu_mlp(tiny_config, make_batch):
    """Pooling comes before the projector; originals are projected too, then brought to unit RMS."""
    params = init_params(tiny_config, jax.random.key(0))
    frames = make_batch(tiny_config).frames
    visual = CrossLMM(tiny_config).apply({"params": params}, frames, method="encode")
    features = SiglipEncoder(tiny_config.vision, "float32", "blockwise").apply(
        {"params": params["encoder"]}, frames.reshape(-1, 32, 32, 3)
    )
    weights = {name: torch.tensor(np.asarray(value)) for name, value in params["projector"].items()}

    def project(x):
        hidden = torch.nn.functional.gelu(torch.tensor(np.asarray(x)) @ weights["w1"] + weights["b1"])
        return (hidden @ weights["w2"] + weights["b2"]).numpy()

    compact = project(jnp.mean(features, axis=1)).reshape(2, 4, -1)
    np.testing.assert_allclose(visual.compact, compact, atol=1e-5)
    originals = project(features).reshape(2, 4, 16, -1)
    originals = originals / np.sqrt((originals**2).mean(-1, keepdims=True) + tiny_config.decoder.rms_norm_eps)
    np.testing.assert_allclose(visual.originals, originals, atol=1e-5)


@pytest.mark.parametrize(("last", "factor"), [(40_000, 2.0), (100_000, 4.0)])
def test_yarn_equals_transformers(tiny_config, replace_config, make_batch, last, factor):
    trained = 32_768
    settings = {
        "head_dim": 64, "rope_theta": 1e6, "yarn_factor": factor, "yarn_trained_positions": trained,
        "max_positions": int(factor * trained),
    }  # fmt: skip
    config = replace_config(tiny_config, decoder=settings, cross_attention={"directions": ()})
    decoder = config.decoder
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=decoder.vocab_size, hidden_size=decoder.width, intermediate_size=decoder.mlp_width,
            num_hidden_layers=decoder.num_layers, num_attention_heads=decoder.num_heads, head_dim=64,
            num_key_value_heads=decoder.num_kv_heads, rms_norm_eps=decoder.rms_norm_eps,
            max_position_embeddings=decoder.max_positions, tie_word_embeddings=decoder.tie_embeddings,
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e6, "factor": factor,
                "original_max_position_embeddings": trained,
            },
        )
    ).eval()  # fmt: skip
    randomise(model)
    params = init_params(config, jax.random.key(0)) | {"decoder": qwen_params(model, decoder)}
    batch = make_batch(config, frames=0, text=61)
    rng = np.random.default_rng(0)
    positions = np.sort(rng.choice(last, batch.tokens.shape, replace=False), axis=1)
    positions[:, -3:] = [last - 2, last - 1, last]
    with torch.no_grad():
        tokens, places = (torch.tensor(x, dtype=torch.long) for x in (batch.tokens, positions))
        theirs = model(tokens, position_ids=places).logits
    batch = batch._replace(positions=positions.astype(np.int32))
    ours = jax.jit(CrossLMM(config).apply)({"params": params}, batch)
    assert float(theirs.std()) > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    plain = replace_config(config, decoder={"yarn_factor": 1.0})
    without = jax.jit(CrossLMM(plain).apply)({"params": params}, batch)
    assert np.abs(without - np.asarray(theirs)).max() > 1e-2
