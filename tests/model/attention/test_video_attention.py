"""Long videos: keys and values made chunk by chunk, equal to those made at once and never all there."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.batch import AllOrNone, SamePerRow, VisibleFrames, VisualOnly, with_known_visibility
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.model import CrossLMM, init_params
from crosslmm_jax.model.attention import cudnn, video_attention
from crosslmm_jax.model.dual_cross_attention import cross_attend, keys_values
from crosslmm_jax.parallel.axis_rules import activation_rules
from crosslmm_jax.parallel.mesh import make_mesh

TOKENS = 4  # compact tokens per frame
SCOPES = ("video", "frame", "window")


@pytest.fixture
def in_chunks(monkeypatch, tiny_config):
    """Makes chunks of three frames of the tiny model, in rows of two."""
    decoder, patches = tiny_config.decoder, tiny_config.vision.num_patches
    frame = 2 * 2 * patches * decoder.num_kv_heads * decoder.head_dim * 4
    monkeypatch.setattr(video_attention, "MAX_WHOLE_KV_BYTES", 3 * frame)
    monkeypatch.setattr(video_attention, "CHUNK_BYTES", 3 * frame)


def one_layer(config, frames, seed=0):
    """Weights, compact tokens, original tokens and visible frames of two rows, one of them shorter."""
    weights = jax.tree.map(lambda w: w[0], init_params(config, jax.random.key(seed))["v2v"])
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, frames * TOKENS, config.decoder.width)).astype(np.float32)
    shape = (2, frames, config.vision.num_patches, config.decoder.width)
    tokens = rng.standard_normal(shape).astype(np.float32)
    frame = np.repeat(np.arange(frames), TOKENS)
    valid = np.array([[frames], [frames - 2]])
    visible = np.where(frame < valid, valid, 0).astype(np.int32)
    return weights, x, tokens, visible, np.tile(frame, (2, 1))


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("frames", "window", "rope"), [(10, 2, "time"), (5, 4, "none")])
def test_chunks_equal_the_whole(
    tiny_config, replace_config, monkeypatch, in_chunks, scope, frames, window, rope
) -> None:
    """Forward and gradients, frames that chunks divide and frames that they do not."""
    cross = {"v2v_scope": scope, "v2v_window": window, "cross_attn_rope": rope}
    config = replace_config(tiny_config, merge={"grid": 2}, cross_attention=cross)
    weights, x, tokens, visible, times = one_layer(config, frames)
    seen = {"visible_frames": VisibleFrames(visible), "times": times, "config": config, "scoped": True}
    chunks = []
    monkeypatch.setattr(video_attention, "_begins", spy(video_attention._begins, chunks))

    def whole(weights, x, tokens):
        return cross_attend(weights, x, keys_values(weights, tokens, config=config), **seen)

    def in_chunks_of(weights, x, tokens):
        return cross_attend(weights, x, tokens, **seen)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, weights, x, tokens):
        out, backward = jax.vjp(function, weights, x, tokens)
        return out, backward(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    expected, found = (with_gradients(function, weights, x, tokens) for function in (whole, in_chunks_of))
    assert chunks and all(begins.size > 1 for begins in chunks)
    # Gradients are sums over all frames, taken in another order.
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))


def spy(function, results):
    @functools.wraps(function)
    def spied(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return spied


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
def test_the_model_and_its_cache_are_the_same_in_chunks(
    tiny_config, replace_config, make_batch, monkeypatch, in_chunks, scope
) -> None:
    config = replace_config(tiny_config, cross_attention={"v2v_scope": scope, "gate_init": 0.5})
    params = {"params": init_params(config, jax.random.key(0))}
    batch = make_batch(config, frames=7)
    model, counts = CrossLMM(config), np.full(2, batch.tokens.shape[1], np.int32)

    visual = jax.jit(lambda p, frames: model.apply(p, frames, method="encode"))(params, batch.frames)

    def run():
        prefill = jax.jit(
            lambda *inputs: model.apply(*inputs, batch, counts, cache_size=int(counts[0]), method="prefill")
        )
        return prefill(params, visual)

    found = run()
    monkeypatch.setattr(video_attention, "MAX_WHOLE_KV_BYTES", 2**40)
    monkeypatch.setattr(video_attention, "CHUNK_BYTES", 2**40)
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(run()), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_known_visibility_changes_nothing(
    tiny_config, replace_config, monkeypatch, in_chunks, scope, chunks
) -> None:
    """AllOrNone and SamePerRow: forward and gradients."""
    config = replace_config(tiny_config, merge={"grid": 2}, cross_attention={"v2v_scope": scope})
    if not chunks:
        monkeypatch.setattr(video_attention, "MAX_WHOLE_KV_BYTES", 2**40)
        monkeypatch.setattr(video_attention, "CHUNK_BYTES", 2**40)
    weights, x, tokens, visible, times = one_layer(config, 5)
    whole = np.full_like(visible, 5)
    text = x[:, :3]
    some = np.array([[0, 5, 5], [5, 5, 0]], np.int32)
    alike = np.array([[2, 2, 2], [0, 0, 0]], np.int32)
    cases = [
        (x, AllOrNone(whole), {"scoped": True, "times": times}),
        (text, AllOrNone(some), {"times": some}),
        (text, SamePerRow(alike), {"times": alike}),
    ]
    for x, seen, arguments in cases:

        def run(weights, x, tokens, seen, arguments=arguments):
            update = cross_attend(weights, x, tokens, config=config, visible_frames=seen, **arguments)
            return jnp.sum(jnp.cos(update)), update

        graded = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))
        found, expected = (
            graded(weights, x, tokens, frames) for frames in (seen, VisibleFrames(seen.counts))
        )
        for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))
        nothing = np.asarray(found[1])[seen.counts == 0]
        assert not nothing.any()


@pytest.mark.slow
@pytest.mark.parametrize("known", [AllOrNone, VisualOnly])
def test_a_prefill_of_a_whole_video_asks_nothing_on_the_way(
    tiny_config, replace_config, make_batch, monkeypatch, known
) -> None:
    """On cuDNN, no branch is taken on the device; and the result is that of the program with branches."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    config = replace_config(
        tiny_config, vision={"width": 32}, cross_attention={"gate_init": 0.5}, attention="cudnn",
        compute_dtype="bfloat16",
    )  # fmt: skip
    params = {"params": init_params(config, jax.random.key(0))}
    batch = make_batch(config, frames=3)
    visible = np.where(batch.visible_frames.counts > 0, 3, 0).astype(np.int32)
    if known is VisualOnly:
        np.put_along_axis(visible, batch.text_slots, 0, axis=1)
    batch = with_known_visibility(batch._replace(visible_frames=VisibleFrames(visible)), 3)
    assert type(batch.visible_frames) is known
    fewer = batch._replace(visible_frames=known(np.minimum(visible, 2)))
    assert type(with_known_visibility(fewer, 3).visible_frames) is VisibleFrames
    counts = np.full(2, visible.shape[1], np.int32)
    found = {}
    model = CrossLMM(config)
    for visibility in (known, VisibleFrames):
        batch = batch._replace(visible_frames=visibility(visible))

        def run(params, batch):
            visual = model.apply(params, batch.frames, method="encode")
            size = int(counts[0])
            return model.apply(params, visual, batch, counts, cache_size=size, method="prefill")

        program = jax.jit(run).lower(params, batch)
        assert ("stablehlo.case" in program.as_text()) == (visibility is VisibleFrames)
        results = program.compile()(params, batch)
        found[visibility] = [np.asarray(x, np.float32) for x in jax.tree.leaves(results)]
    for got, wanted in zip(*found.values(), strict=True):
        np.testing.assert_allclose(got, wanted, atol=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [2, 8])  # heads of keys are spread; there are fewer than devices
@pytest.mark.parametrize("scope", SCOPES)
def test_heads_over_devices_leave_chunks_of_frames(
    tiny_config, replace_config, monkeypatch, in_chunks, scope, tensor
) -> None:
    config = replace_config(tiny_config, merge={"grid": 2}, cross_attention={"v2v_scope": scope})
    weights, x, tokens, visible, times = one_layer(config, 16)
    seen = {"visible_frames": VisibleFrames(visible), "times": times, "config": config, "scoped": True}
    expected = cross_attend(weights, x, keys_values(weights, tokens, config=config), **seen)
    chunks = []
    monkeypatch.setattr(video_attention, "_begins", spy(video_attention._begins, chunks))
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=8 // tensor, tensor=tensor))):
        split = jax.jit(lambda *arguments: cross_attend(*arguments, rules=activation_rules(), **seen))
        np.testing.assert_allclose(split(weights, x, tokens), expected, atol=2e-6)
    assert bool(chunks) == (scope != "video")


def v2v_of(scope: str, frames: int):
    """V2V of one layer with the 2B model's widths as a function, and the shapes that it takes."""
    config = presets.crosslmm_2b()
    cross = dataclasses.replace(config.cross_attention, v2v_scope=scope)
    config = dataclasses.replace(config, cross_attention=cross, compute_dtype="float32")
    width, c = config.decoder.width, config.merge.tokens_per_frame
    weights = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))["v2v"]
    weights = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), weights)
    x = jax.ShapeDtypeStruct((1, frames * c, width), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, frames, config.vision.num_patches, width), jnp.float32)
    seen = jax.ShapeDtypeStruct((1, frames * c), jnp.int32)

    def update(weights, x, tokens, seen):
        return cross_attend(
            weights, x, tokens, visible_frames=VisibleFrames(seen), times=seen, config=config, scoped=True
        )

    return config, update, (weights, x, tokens, seen)


def compiled_v2v(scope: str, frames: int):
    """The same compiled."""
    config, update, shapes = v2v_of(scope, frames)
    return config, jax.jit(update).lower(*shapes).compile()


def gradient_of_v2v(frames: int):
    """Gradients of weights, compact and original tokens, compiled."""
    _, update, shapes = v2v_of("video", frames)
    gradient = jax.grad(lambda *arguments: jnp.sum(jnp.cos(update(*arguments))), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(*shapes).compile()


@pytest.mark.parametrize("scope", SCOPES)
def test_memory_of_a_long_video(scope: str) -> None:
    """Once a video is split, temporaries grow by queries alone, and no array holds all keys of all heads."""
    small, large = 2048, 4096
    config, few = compiled_v2v(scope, small)
    many = compiled_v2v(scope, large)[1]
    grown = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    queries = (large - small) * config.merge.tokens_per_frame * config.decoder.width * 4
    keys = (large - small) * config.vision.num_patches * config.decoder.head_dim * 4
    # Queries, what is read for them and a rearranged copy of each; of keys and values, one head's.
    assert grown <= 6 * queries + (2.1 * keys if scope == "video" else 0)
    sizes = {
        int(np.prod([int(n) for n in found.split(",")]))
        for found in re.findall(r"\b(?:bf16|f32)\[([\d,]+)\]", many.as_text())
    }
    all_keys = large * config.vision.num_patches * config.decoder.num_kv_heads * config.decoder.head_dim
    originals = large * config.vision.num_patches * config.decoder.width
    assert originals in sizes, "shapes were not read"
    assert all_keys not in sizes
    assert not [size for size in sizes if all_keys <= size < originals]


@pytest.mark.slow
def test_the_backward_pass_over_a_long_video_keeps_no_copy_of_it() -> None:
    """It holds one head's part of the tokens' gradient, keys and values with their gradients, and queries."""
    taken = {frames: gradient_of_v2v(frames).memory_analysis().temp_size_in_bytes for frames in (1600, 3200)}
    config = presets.crosslmm_2b()
    originals = (3200 - 1600) * config.vision.num_patches * config.decoder.width * 4
    assert taken[3200] - taken[1600] < 1.6 * originals, taken
