"""T2V's keys and values in 8 bits: what attention makes of them, and what a model that reads them says."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.batch import VisibleFrames
from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.inference.generate import RowSettings, generate, start
from crosslmm_jax.model import CrossLMM, dual_cross_attention, init_params
from crosslmm_jax.model.dual_cross_attention import (
    KeysValues,
    compress,
    cross_attend,
    keys_values,
    video_cache,
)
from crosslmm_jax.model.quantisation.quantise import largest
from crosslmm_jax.parallel.axis_rules import activation_rules
from crosslmm_jax.parallel.mesh import make_mesh
from crosslmm_jax.profiling.record import Request
from crosslmm_jax.profiling.tasks import decode

PRECISIONS = ("fp8", "int8")
FRAMES, PATCHES = 4, 600  # together more keys than `blockwise` reads at once


def cached(config: ModelConfig, precision: str) -> ModelConfig:
    cross = dataclasses.replace(config.cross_attention, cache_dtype=precision)
    return dataclasses.replace(config, cross_attention=cross)


def keys_and_values(config: ModelConfig, *, frames: int = FRAMES) -> KeysValues:
    """Random ones; some channels are far from 0, as with a large bias, and some are wide."""
    rng = np.random.default_rng(0)
    shape = (2, frames, PATCHES, config.decoder.num_kv_heads, config.decoder.head_dim)
    keys, values = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    keys[..., 3] += 40
    keys[..., 5] *= 20
    values[..., 7] *= 20
    return KeysValues(jnp.asarray(keys), jnp.asarray(values))


def restored(kv: KeysValues) -> KeysValues:
    """The numbers that 8 bits and their scales stand for, in float32."""
    assert kv.key_scale is not None and kv.value_scale is not None
    keys, values = (
        x.astype(jnp.float32) * scale[:, None, None]
        for x, scale in ((kv.keys, kv.key_scale), (kv.values, kv.value_scale))
    )
    return KeysValues(keys, values)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_channel_is_rounded_by_its_own_largest(tiny_config, precision: str) -> None:
    """Values as they are; keys up to what all keys of a head have in common."""
    kv = keys_and_values(tiny_config)
    got = compress(kv, precision)
    assert got.keys.dtype.itemsize == got.values.dtype.itemsize == 1
    assert got.key_scale is not None and got.key_scale.shape == (2, 2, 16)
    centred = kv.keys - kv.keys.mean(axis=(1, 2), keepdims=True)
    for x, y in zip((centred, kv.values), restored(got)[:2], strict=True):
        most = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
        step = most / largest(got.keys.dtype)
        half = step / 2 if precision == "int8" else jnp.maximum(jnp.abs(x) / 16, step / 1024)
        assert bool(jnp.all(jnp.abs(x - y) <= half * 1.001))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_long_videos_cache_is_made_in_chunks(tiny_config, monkeypatch, precision: str) -> None:
    monkeypatch.setattr(dual_cross_attention, "CHUNK_FRAMES", 4)
    config, rng = cached(tiny_config, precision), np.random.default_rng(0)
    weights = jax.tree.map(lambda w: w[1], init_params(config, jax.random.key(0))["t2v"])
    tokens, counts = (
        rng.standard_normal((2, 12, 16, config.decoder.width)).astype(np.float32),
        jnp.array([12, 7]),
    )
    tokens[1, 7:] *= 100  # padding, on which no scale may depend
    whole = keys_values(weights, tokens, config=config)
    made = jax.jit(functools.partial(video_cache, kv=None, config=config))
    for real in (counts, None):
        got, expected = made(weights, tokens, num_frames=real), compress(whole, precision, real)
        np.testing.assert_allclose(got.key_scale, expected.key_scale, rtol=1e-5)
        np.testing.assert_allclose(got.value_scale, expected.value_scale, rtol=1e-5)
        for ours, theirs in zip(restored(got)[:2], restored(expected)[:2], strict=True):
            differ = np.abs(ours - theirs) > 1e-4
            assert differ.mean() < 1e-3  # a number halfway between two steps may go either way


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["reference", "plain", "blockwise"])
def test_every_backend_reads_8_bits_as_what_they_stand_for(tiny_config, backend: str, precision: str) -> None:
    """Scales in the queries and in the result are scales in keys and values; ranges are kept."""
    config = dataclasses.replace(tiny_config, attention=backend)
    params = init_params(config, jax.random.key(0))
    weights = jax.tree.map(lambda x: x[0], params["t2v"])
    kv = compress(keys_and_values(config), precision)
    x = jax.random.normal(jax.random.key(1), (2, 5, config.decoder.width))
    seen = jnp.array([[0, 1, 2, 4, 4], [4, 0, 3, 3, 1]])

    def attend(kv: KeysValues) -> np.ndarray:
        update = cross_attend(weights, x, kv, visible_frames=VisibleFrames(seen), times=seen, config=config)
        return np.asarray(update)

    got, expected = attend(kv), attend(restored(kv))
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
    assert np.all(got[np.asarray(seen) == 0] == 0)


def prompt_of(config: ModelConfig, make_batch, precision: str):
    """Model, parameters, logits after a prompt with a video, and the cache."""
    params = {"params": init_params(config, jax.random.key(3))}
    model = CrossLMM(cached(config, precision))
    batch = make_batch(config, batch=2, frames=4, text=8)
    visual = model.apply(params, batch.frames, method="encode")
    counts = np.full(2, batch.tokens.shape[1], np.int32)
    logits, cache = model.apply(params, visual, batch, counts, cache_size=48, method="prefill")
    return model, params, logits, cache


def untied(config: ModelConfig, replace_config) -> ModelConfig:
    # With a tied head a random model repeats its last token for ever. Wide gates: much depends on T2V.
    return replace_config(config, decoder={"tie_embeddings": False}, cross_attention={"gate_init": 2.0})


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.02), ("fp8", 0.1)])
def test_logits_and_maps_stay_close(
    tiny_config, replace_config, make_batch, precision: str, tolerance: float
) -> None:
    """Against the cache in the compute dtype, on the same text. A prompt itself reads no cache."""
    config = untied(tiny_config, replace_config)
    _, _, first, exact = prompt_of(config, make_batch, "compute")
    wide = CrossLMM(config)
    model, params, same, cache = prompt_of(config, make_batch, precision)
    np.testing.assert_array_equal(first, same)
    assert exact.t2v[0].keys.dtype == jnp.float32 and cache.t2v[0].keys.dtype.itemsize == 1
    text = np.random.default_rng(0).integers(0, 512, (2, 6)).astype(np.int32)
    counts = np.array([6, 4], np.int32)
    maps, expected_maps = (
        np.asarray(m.apply(params, c, text, counts, method="observe"))
        for m, c in ((model, cache), (wide, exact))
    )
    np.testing.assert_allclose(maps.sum(axis=(-2, -1)), 1, rtol=1e-5)
    assert np.abs(maps - expected_maps).max() < tolerance * expected_maps.max()
    differs = False
    for _ in range(3):
        expected, exact = wide.apply(params, exact, text, counts, method="extend")
        logits, cache = model.apply(params, cache, text, counts, method="extend")
        assert np.abs(logits - expected).max() < tolerance * float(jnp.std(expected))
        differs |= bool(np.any(logits != expected))
    assert differs, "the cache was read"


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_answers_are_those_of_one_step_after_another(
    tiny_config, replace_config, make_batch, precision: str
) -> None:
    config = untied(tiny_config, replace_config)
    model, params, logits, cache = prompt_of(config, make_batch, precision)
    t2v, expected, at = cache.t2v, [], cache
    for _ in range(6):
        token = logits.argmax(axis=-1).astype(jnp.int32)
        expected.append(np.asarray(token))
        logits, at = model.apply(params, at, token[:, None], np.ones(2, np.int32), method="extend")
    first, cache = model.apply(params, cache, expected[0][:, None], np.ones(2, np.int32), method="extend")
    arguments = {"vocab_size": config.decoder.vocab_size}
    rows = RowSettings.joined([RowSettings.of(limit=5)] * 2)
    state = start(first, cache._replace(t2v=None), rows, jnp.zeros(2, jnp.int32), **arguments)
    tokens, _, _ = generate(model, params["params"], t2v, state, rows, steps=8, **arguments)
    assert (tokens >= 0).sum(axis=1).tolist() == [5, 5]
    np.testing.assert_array_equal(tokens[:, :5], np.stack(expected[1:], axis=1))
    assert len({tuple(column) for column in expected}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1, "context": 4, "tensor": 2}, {"data": 2, "context": 4}], ids=str)
def test_on_any_mesh_equal_one_device(tiny_config, replace_config, make_batch, mesh) -> None:
    """Frames over devices: the scales are those of all frames."""
    config = cached(untied(tiny_config, replace_config), "int8")
    params = {"params": init_params(config, jax.random.key(3))}
    batch = make_batch(config, batch=2, frames=4, text=8)
    counts = np.full(2, batch.tokens.shape[1], np.int32)
    text = np.arange(12, dtype=np.int32).reshape(2, 6)

    def answer(model):
        def run(params, batch):
            visual = model.apply(params, batch.frames, method="encode")
            _, cache = model.apply(params, visual, batch, counts, cache_size=48, method="prefill")
            logits, _ = model.apply(params, cache, text, np.full(2, 6, np.int32), method="extend")
            return logits, cache.t2v

        return jax.jit(run)(params, batch)

    expected, kv = answer(CrossLMM(config))
    with jax.set_mesh(make_mesh(MeshConfig(**mesh))):
        got, spread = answer(CrossLMM(config, activation_rules()))
    for ours, exact in zip(spread, kv, strict=True):
        np.testing.assert_allclose(ours.key_scale, exact.key_scale, rtol=1e-5)
        # A number next to an edge between two codes may land on either side of it.
        assert int(np.abs(np.asarray(ours.keys, np.int32) - np.asarray(exact.keys, np.int32)).max()) <= 1
    np.testing.assert_allclose(got, expected, atol=5e-3)


@pytest.mark.slow
def test_the_loop_over_tokens_carries_8_bits() -> None:
    """At real widths: keys and values never become a wide array that outlives a token."""
    config = presets.crosslmm_2b()
    config = dataclasses.replace(
        config, decoder=dataclasses.replace(config.decoder, num_layers=4, vocab_size=1024, mlp_width=64),
        vision=dataclasses.replace(config.vision, num_layers=2), attention="plain",
    )  # fmt: skip
    request = Request(task="decode", system="", frames=(16,), steps=8)
    video = r"\[(?:\d+,)*16,729,2,128\]"
    for precision, narrow in (("compute", "bf16"), ("int8", "s8"), ("fp8", "f8e4m3fn")):
        text = decode.case(config.at_precision(precision), request, 16, 1.0).lower().compile().as_text()
        held = {
            name
            for line in text.splitlines()
            if " get-tuple-element(" in line or " parameter(" in line
            for name in re.findall(
                rf"(\w+){video}", line.split(" get-tuple-element(")[0].split(" parameter(")[0]
            )
        }
        assert held == {narrow}
