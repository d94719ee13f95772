"""The plain PyTorch model against ours: two implementations of one design, logits and gradients."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from crosslmm_jax.batch import Batch
from crosslmm_jax.config_io import to_dict
from crosslmm_jax.convert import torch_reference
from crosslmm_jax.convert.families import llava
from crosslmm_jax.convert.from_hf import Request, convert_from_hf
from crosslmm_jax.convert.rules import expand
from crosslmm_jax.convert.to_hf import convert_to_hf
from crosslmm_jax.model import CrossLMM, init_params
from crosslmm_jax.model.loss import next_token_loss
from crosslmm_jax.model_folder import load_model_config, load_weights
from crosslmm_jax.model_folder.weights import flatten

# Every choice that a config has, several at once: each costs a compilation.
ALTERNATIVES = {
    "default": {},
    "bilinear, frame scope, untied": {
        "merge": {"grid": 3, "pooling": "bilinear"},
        "cross_attention": {"v2v_scope": "frame"},
        "decoder": {"tie_embeddings": False},
    },
    "antialias, window, time rope, odd pixels": {
        "vision": {"image_size": 38},
        "merge": {"grid": 3, "pooling": "bilinear_antialias"},
        "cross_attention": {"v2v_scope": "window", "v2v_window": 1, "cross_attn_rope": "time"},
    },
    "input norm, encoder kv, feature layer -3": {
        "vision": {"feature_layer": -3},
        "merge": {"projector_input_norm": True, "grid": 2},
        "cross_attention": {"kv_source": "encoder"},
    },
    "every 3 from 1, post-layernorm, time rope": {
        "vision": {"feature_layer": -1, "post_layernorm": True},
        "cross_attention": {"cross_attn_every": 3, "cross_attn_offset": 1, "cross_attn_rope": "time"},
    },
    "every layer, last vision layer, frame scope, encoder kv, time rope": {
        "vision": {"feature_layer": -1},
        "cross_attention": {
            "cross_attn_every": 1, "kv_source": "encoder", "v2v_scope": "frame", "cross_attn_rope": "time"
        },
    },
    "every 2 from 2, t2v alone": {"cross_attention": {"cross_attn_offset": 2, "directions": ("t2v",)}},
    "v2v alone, window": {
        "cross_attention": {"directions": ("v2v",), "v2v_scope": "window", "v2v_window": 2}
    },
    "neither": {"cross_attention": {"directions": ()}},
}  # fmt: skip


def noisy_params(config):
    """Random weights that are nowhere 0 or 1, with a gate of its own in every layer and direction."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(0)))
    return jax.tree.map(
        lambda x: (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32) if x.ndim < 3 else x, params
    )


def names_of(params, config) -> dict[str, np.ndarray]:
    """`params` under the names and in the shapes of an export."""
    flat = {name: np.asarray(value) for name, value in flatten(params).items()}
    slots = expand(llava.EXPORT_RULES, config, {name: value.shape for name, value in flat.items()})
    rows = {slot.hf: flat[slot.ours] if slot.row is None else flat[slot.ours][slot.row] for slot in slots}
    return {slot.hf: np.array(slot.out_of(rows[slot.hf]), order="C") for slot in slots}


def export(folder: Path, params, config) -> Path:
    """A folder as `from_folder` reads it."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(names_of(params, config), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"crosslmm": to_dict(config)}))
    return folder


def as_tensors(batch):
    return {name: torch.from_numpy(np.asarray(value)) for name, value in batch.arrays().items()}


ROWS = [[3, (2,), 4, (2,), 5], [(3,), 6], [7]]  # two videos; one from the start, padded; text alone


@pytest.mark.slow
@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_logits_and_gradients_equal(tiny_config, replace_config, interleaved_batch, tmp_path, alternative):
    config = replace_config(tiny_config, **ALTERNATIVES[alternative])
    params = noisy_params(config)
    batch = interleaved_batch(config, ROWS, frames=5, text=13)

    def loss_and_logits(model, batch):  # as `CrossLMM.loss` and `__call__`, with one forward pass for both
        hidden = model.hidden(model.encode(batch.frames), batch)
        total, weight = next_token_loss(hidden, model.decoder.head(), batch.tokens, batch.loss_mask)
        return total / weight, model.decoder.logits(hidden)

    def run(params):
        return CrossLMM(config).apply({"params": params}, batch, method=loss_and_logits)

    (loss, logits), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    model = torch_reference.CrossLMM.from_folder(export(tmp_path / "out", params, config))
    theirs = model(as_tensors(batch))
    np.testing.assert_allclose(logits, theirs.detach(), atol=1e-4, rtol=0)
    total, weight = model.loss(as_tensors(batch))
    np.testing.assert_allclose(loss, (total / weight).detach(), atol=1e-5, rtol=0)

    (total / weight).backward()
    wanted = names_of(jax.tree.map(np.asarray, gradients), config)
    assert set(wanted) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        np.testing.assert_allclose(wanted[name], found, atol=1e-4, rtol=0, err_msg=name)
    # Agreement would say little about parameters that nothing depends on.
    used = [direction for direction in ("v2v", "t2v") if direction in config.cross_attention.directions]
    assert all(np.abs(gradients[direction]["wk"]).max() > 1e-4 for direction in used)


@pytest.mark.slow
def test_padding_frames_and_later_videos_are_not_seen(tiny_config, interleaved_batch, tmp_path):
    model = torch_reference.CrossLMM.from_folder(
        export(tmp_path / "out", noisy_params(tiny_config), tiny_config)
    )
    batch = as_tensors(interleaved_batch(tiny_config, ROWS, frames=5, text=13))
    changed = batch | {"frames": batch["frames"].clone()}
    changed["frames"][0, 2:] = 255 - changed["frames"][0, 2:]  # the second video and the padding
    changed["frames"][1, 3:] = 0  # padding
    before, after = model(batch).detach(), model(changed).detach()
    differs = (before != after).any(dim=-1)
    assert not differs[0, :9].any() and differs[0, 9:16].all()
    assert not differs[1, :9].any() and not differs[2, :7].any()


@pytest.mark.slow
def test_greedy_generation_is_the_same(tiny_config, tmp_path):
    """Ours runs on a cache, the other runs everything again for each token."""
    params = noisy_params(tiny_config)
    model = torch_reference.CrossLMM.from_folder(export(tmp_path / "out", params, tiny_config))
    frames = np.random.default_rng(3).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    batch = model.prompt(torch.from_numpy(frames), [5, 6], [7, 8, 9])
    found = model.generate(batch, max_new_tokens=32)
    ours = CrossLMM(tiny_config)
    arrays = {name: value.numpy().astype(np.int32) for name, value in batch.items() if name != "frames"}
    del arrays["text_slots"]
    prompt = Batch.create(**arrays)
    count = jnp.array([prompt.tokens.shape[1]])

    @jax.jit
    def start(params, frames, prompt):
        visual = ours.apply({"params": params}, frames, method="encode")
        return ours.apply({"params": params}, visual, prompt, count, cache_size=64, method="prefill")

    @jax.jit
    def step(params, cache, token):
        return ours.apply({"params": params}, cache, token, jnp.array([1]), method="extend")

    logits, cache = start(params, frames[None], prompt)
    tokens = []
    for _ in range(32):
        tokens.append(int(jnp.argmax(logits[0])))
        logits, cache = step(params, cache, jnp.array([[tokens[-1]]]))
    assert found == tokens and len(set(tokens)) > 1
    assert (
        model.generate(batch, max_new_tokens=32, stop_tokens=(tokens[3],))
        == tokens[: tokens.index(tokens[3])]
    )
    assert max(model.generate(batch, max_new_tokens=8, limit=100)) < 100


def test_a_folder_that_does_not_fit_is_refused(tiny_config, tmp_path):
    tensors = names_of(noisy_params(tiny_config), tiny_config)
    export(tmp_path, noisy_params(tiny_config), tiny_config)
    tensors["model.layers.9.v2v_gate"] = tensors.pop("model.layers.0.v2v_gate")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        torch_reference.CrossLMM.from_folder(tmp_path)
    message = str(error.value)
    assert "model.layers.0.v2v_gate is missing" in message
    assert "model.layers.9.v2v_gate is unknown" in message
    assert "model.norm.weight is [63], not [64]" in message


def test_parts_that_are_not_run_may_be_stored(tiny_config, tmp_path):
    """A whole tower with its last layer and its head, and a tied head written out."""
    tensors = names_of(noisy_params(tiny_config), tiny_config)
    export(tmp_path, noisy_params(tiny_config), tiny_config)
    for name in [name for name in tensors if ".encoder.layers.0." in name]:
        tensors[name.replace("layers.0", "layers.2")] = tensors[name]
    tensors |= {"vision_model.head.probe": np.ones(3, np.float32), "lm_head.weight": np.ones(3, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    torch_reference.CrossLMM.from_folder(tmp_path)


@pytest.mark.slow
def test_an_export_runs_where_this_package_is_not(sources, interleaved_batch, tmp_path):
    """The whole way: `from-hf`, `to-hf --torch-reference`, and a process without jax and this package."""
    request = Request(
        vision=str(sources.vision), llm=str(sources.untied),
        overrides=("--merge.grid", "2", "--cross-attention.gate-init", "0.7"),
    )  # fmt: skip
    convert_from_hf(request, tmp_path / "model", tokenizer=sources.tokenizer)
    convert_to_hf(tmp_path / "model", tmp_path / "out", torch_reference=True)
    config = dataclasses.replace(load_model_config(tmp_path / "model"), compute_dtype="float32")
    batch = interleaved_batch(config, ROWS, frames=5, text=13)
    np.savez(tmp_path / "batch.npz", **batch.arrays())
    program = """
import sys
import numpy as np
import torch
sys.modules["jax"] = sys.modules["crosslmm_jax"] = None
sys.path.insert(0, "out/crosslmm")
from modeling_crosslmm import CrossLMM
batch = {name: torch.from_numpy(value) for name, value in np.load("batch.npz").items()}
with torch.no_grad():
    np.save("logits.npy", CrossLMM.from_folder("out/crosslmm")(batch).numpy())
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    params = load_weights(tmp_path / "model", config, dtype="float32")
    logits = jax.jit(CrossLMM(config).apply)({"params": params}, batch)
    np.testing.assert_allclose(logits, np.load(tmp_path / "logits.npy"), atol=1e-4, rtol=0)
