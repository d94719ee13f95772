"""What the whole model promises: gates, causality, placements, caches, padding, loss."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.batch import Batch, VisibleFrames
from crosslmm_jax.model import CrossLMM, init_params
from crosslmm_jax.model.dual_cross_attention import cross_attend, keys_values
from crosslmm_jax.model.layer_loops import Placement, scan_layers

# Tests are compiled in the quickest way, which may round two programs otherwise; this is how users' are.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else None


@functools.cache
def program(config, method="__call__", as_users=False, **options):
    """The model's method as one program for all tests: parameters and inputs -> what it returns."""
    return jax.jit(
        lambda params, *inputs: CrossLMM(config).apply({"params": params}, *inputs, method=method, **options),
        compiler_options=AS_USERS if as_users else None,
    )


def logits_of(config, params, batch, as_users=False):
    return np.asarray(program(config, as_users=as_users)(params, batch))


def random_norms(params, seed=5):
    """Norm scales and biases away from 1 and 0, so that a forgotten one shows."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.fixture(scope="module")
def params():
    """Of the tiny model, to be read only."""
    return random_norms(init_params(presets.tiny(), jax.random.key(0)))


@pytest.mark.slow
def test_gates_at_zero_equal_the_model_without_cross_attention(tiny_config, replace_config, make_batch):
    config = replace_config(tiny_config, cross_attention={"gate_init": 0.0})
    without = replace_config(config, cross_attention={"directions": ()})
    params = init_params(config, jax.random.key(1))
    batch = make_batch(config)
    of_both = (logits_of(c, params, batch, as_users=True) for c in (config, without))
    assert np.array_equal(*of_both)
    opened = init_params(tiny_config, jax.random.key(1))
    assert not np.allclose(
        logits_of(tiny_config, opened, batch), logits_of(without, params, batch), atol=1e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["v2v", "t2v"])
def test_each_direction_reads_the_original_tokens(tiny_config, replace_config, make_batch, direction):
    """Only cross-attention sees a change inside a frame that does not change the frame's pooled token."""
    config = replace_config(
        tiny_config, cross_attention={"directions": (direction,)}, vision={"feature_layer": -3}
    )
    params = init_params(config, jax.random.key(0))
    # One encoder layer, switched off, and no positions: features are a function of the patch alone.
    layers = jax.tree.map(jnp.zeros_like, params["encoder"]["layers"])
    params["encoder"] |= {"layers": layers, "position_embedding": 0 * params["encoder"]["position_embedding"]}
    batch = make_batch(config)
    # Features are linear in a patch's pixels, so that swapping the upper halves of two patches leaves the
    # mean of all patches as it was.
    swapped = batch._replace(frames=batch.frames.copy())
    swapped.frames[:, 1, :4, :8] = batch.frames[:, 1, :4, 8:16]
    swapped.frames[:, 1, :4, 8:16] = batch.frames[:, 1, :4, :8]
    off = replace_config(config, cross_attention={"directions": ()})
    np.testing.assert_allclose(logits_of(off, params, batch), logits_of(off, params, swapped), atol=1e-5)
    difference = logits_of(config, params, batch) - logits_of(config, params, swapped)
    assert np.abs(difference).max() > 1e-3


@pytest.mark.slow
def test_alternatives_run_and_differ(tiny_config, replace_config, make_batch):
    base = replace_config(tiny_config, merge={"grid": 3})
    batch = make_batch(base, frames=5, text=9, before=2)
    variants = {
        "base": {},
        "bilinear": {"merge": {"pooling": "bilinear"}},
        "antialias": {"merge": {"pooling": "bilinear_antialias"}},
        "input norm": {"merge": {"projector_input_norm": True}},
        "encoder kv": {"cross_attention": {"kv_source": "encoder"}},
        "fresh": {"cross_attention": {"cross_attn_init": "fresh"}},
        "frame": {"cross_attention": {"v2v_scope": "frame"}},
        "window": {"cross_attention": {"v2v_scope": "window", "v2v_window": 1}},
        "rope": {"cross_attention": {"cross_attn_rope": "time"}},
        "last layer": {"vision": {"feature_layer": -1}},
        "post layernorm": {"vision": {"post_layernorm": True}},
        "every layer": {"cross_attention": {"cross_attn_every": 1}},
        "offset": {"cross_attention": {"cross_attn_offset": 1}},
    }
    results = {}
    for name, parts in variants.items():
        config = replace_config(base, **parts)
        params = init_params(config, jax.random.key(0))
        params["encoder"]["post_norm_scale"] = params["encoder"]["post_norm_scale"] * 1.5
        results[name] = logits_of(config, params, batch)
        assert np.all(np.isfinite(results[name])), name
    for name, value in results.items():
        if name != "base":
            assert np.abs(value - results["base"]).max() > 1e-4, f"{name} changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("frames,window", [(5, 1), (6, 2), (4, 9), (7, 3)])
def test_window_scope_equals_frame_by_frame(tiny_config, replace_config, make_batch, frames, window):
    """V2V in a window against one call per frame, given only the frames of its window."""
    scope = {"v2v_scope": "window", "v2v_window": window}
    config = replace_config(tiny_config, merge={"grid": 2}, cross_attention=scope)
    weights = jax.tree.map(lambda w: w[0], init_params(config, jax.random.key(0))["v2v"])
    rng = np.random.default_rng(frames)
    x = rng.standard_normal((2, frames * 4, 64)).astype(np.float32)
    tokens = rng.standard_normal((2, frames, 16, 64)).astype(np.float32)
    valid = np.array([frames, frames - 2])
    frame = np.repeat(np.arange(frames), 4)
    visible = np.where(frame < valid[:, None], valid[:, None], 0).astype(np.int32)
    kv = keys_values(weights, tokens, config=config)
    attend = jax.jit(functools.partial(cross_attend, config=config), static_argnames="scoped")
    times = np.tile(frame, (2, 1))
    ours = attend(weights, x, kv, visible_frames=VisibleFrames(visible), times=times, scoped=True)
    for f in range(frames):
        low, high = max(0, f - window), f + window + 1
        part = jax.tree.map(lambda a, low=low, high=high: a[:, low:high], kv)
        count = np.clip(np.where(f < valid, np.minimum(high, valid) - low, 0), 0, None)
        seen = np.repeat(count[:, None], 4, axis=1).astype(np.int32)
        of_frame = slice(4 * f, 4 * f + 4)
        one = attend(
            weights, x[:, of_frame], part, visible_frames=VisibleFrames(seen), times=times[:, of_frame]
        )
        np.testing.assert_allclose(ours[:, of_frame], one, atol=1e-5)


@pytest.mark.parametrize(
    "layers,every,offset", [(4, 2, 0), (4, 2, 1), (5, 2, 0), (7, 3, 4), (5, 1, 2), (3, 8, 1), (9, 4, 3)]
)
def test_scan_equals_a_loop_over_layers(layers, every, offset):
    weights = np.arange(1.0, layers + 1, dtype=np.float32)
    at = list(range(offset, layers, every))
    cross = np.arange(10.0, 10 + len(at), dtype=np.float32)

    def plain(x, w):
        return 0.5 * jnp.cos(x) + 0.01 * w

    def crossed(x, w, c):
        return 0.5 * jnp.sin(x + c) - 0.02 * w

    expected = jnp.float32(0.3)
    for i, w in enumerate(weights):
        if i in at:
            expected = crossed(expected, w, cross[at.index(i)])
        else:
            expected = plain(expected, w)

    def layer(x, w, c):
        return plain(x, w) if c is None else crossed(x, w, c)

    placement = Placement(layers, every, offset)
    assert [i for i in range(layers) if placement.cross_index(i) is not None] == at
    for remat in (False, True):
        got = scan_layers(layer, jnp.float32(0.3), weights, cross, placement=placement, remat=remat)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_layers_after_the_scan_are_recomputed_too():
    """Outside of a scan XLA would merge what is recomputed with what was computed, but for a barrier."""

    def last(weights, remat):
        def layer(x, w, *_):
            return jnp.sin(x @ w)

        placement = Placement(3, 2, 0)
        return jnp.sum(
            scan_layers(layer, jnp.ones(8), weights, weights[:2], placement=placement, remat=remat)
        )

    weights = jnp.ones((3, 8, 8))
    for remat in (False, True):
        text = jax.jit(jax.grad(last), static_argnums=1).lower(weights, remat).as_text()
        assert ("optimization_barrier" in text) == remat


def two_media_batch(config, make_batch):
    """text, medium of 2 frames, text, medium of 3 frames, text."""
    batch = make_batch(config, batch=1, frames=5, text=12)
    return Batch.create(
        tokens=batch.tokens, frames=batch.frames, visual_slots=np.array([[3, 4, 8, 9, 10]], np.int32),
        visible_frames=np.array([[0] * 3 + [2] * 5 + [5] * 9], np.int32),
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["video", "frame", "window"])
def test_later_media_leave_earlier_logits_bit_equal(tiny_config, replace_config, make_batch, scope):
    config = replace_config(tiny_config, cross_attention={"v2v_scope": scope})
    params = init_params(config, jax.random.key(0))
    batch = two_media_batch(config, make_batch)
    other = batch._replace(frames=batch.frames.copy())
    other.frames[:, 2:] = 255 - other.frames[:, 2:]
    before, after = logits_of(config, params, batch), logits_of(config, params, other)
    assert np.array_equal(before[:, :8], after[:, :8])
    assert not np.array_equal(before[:, 8:], after[:, 8:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["frames", "text", "both"])
def test_padding_to_a_larger_bucket_changes_nothing(tiny_config, make_batch, params, kind):
    small = make_batch(tiny_config, frames=4, text=10)
    frames, text = (4 if kind == "text" else 7), (10 if kind == "frames" else 21)
    large = make_batch(tiny_config, frames=frames, text=text, valid_frames=(4, 4), valid_text=(10, 10))
    large.tokens[:, :14] = small.tokens
    ours, padded = logits_of(tiny_config, params, small), logits_of(tiny_config, params, large)
    np.testing.assert_allclose(padded[:, :14], ours, atol=1e-5)
    loss = program(tiny_config, "loss")
    np.testing.assert_allclose(loss(params, large), loss(params, small), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rope", ["none", "time"])
@pytest.mark.parametrize("directions", [("v2v", "t2v"), ("v2v",), ()])
def test_prefill_and_extend_equal_the_full_forward(tiny_config, replace_config, make_batch, rope, directions):
    """Rows of different length: a prefix at once, a chunk of text, then token by token."""
    config = replace_config(tiny_config, cross_attention={"cross_attn_rope": rope, "directions": directions})
    params = random_norms(init_params(config, jax.random.key(0)))
    full = make_batch(config, frames=3, text=14, valid_frames=(3, 2))
    expected = logits_of(config, params, full)
    visual = program(config, "encode")(params, full.frames)
    ends = np.array([3 + 3 + 2, 3 + 2 + 2], np.int32)  # valid prefix of each row
    prompt = make_batch(config, frames=3, text=7, valid_frames=(3, 2), valid_text=(5, 5))
    prompt = prompt._replace(tokens=full.tokens[:, : prompt.tokens.shape[1]])
    logits, cache = program(config, "prefill", cache_size=32)(params, visual, prompt, ends)
    rows = np.arange(2)
    np.testing.assert_allclose(logits, expected[rows, ends - 1], atol=1e-5)
    extend = program(config, "extend")
    tokens = np.stack([full.tokens[b, ends[b] : ends[b] + 4] for b in rows])
    counts = np.array([4, 3], np.int32)
    logits, cache = extend(params, cache, tokens, counts)
    at = ends + counts
    np.testing.assert_allclose(logits, expected[rows, at - 1], atol=1e-5)
    for _ in range(4):
        step = full.tokens[rows, at][:, None]
        logits, cache = extend(params, cache, step, np.ones(2, np.int32))
        at = at + 1
        np.testing.assert_allclose(logits, expected[rows, at - 1], atol=1e-5)
    assert np.array_equal(cache.num_tokens, at)


@pytest.mark.slow
def test_text_after_a_cache_reads_the_video_by_t2v_alone(tiny_config, replace_config, make_batch):
    """A model without T2V ignores the video KV cache of one that has it."""
    without = replace_config(tiny_config, cross_attention={"directions": ("v2v",)})
    params = init_params(tiny_config, jax.random.key(0))
    prompt = make_batch(tiny_config, frames=3, text=7)
    length = np.full(2, prompt.tokens.shape[1], np.int32)
    visual = program(tiny_config, "encode")(params, prompt.frames)
    _, cache = program(tiny_config, "prefill", cache_size=32)(params, visual, prompt, length)
    words = np.ones((2, 1), np.int32), np.ones(2, np.int32)
    ignored, bare = (
        program(without, "extend")(params, given, *words)[0] for given in (cache, cache._replace(t2v=None))
    )
    assert cache.t2v is not None
    np.testing.assert_array_equal(ignored, bare)


@pytest.mark.slow
def test_loss_equals_cross_entropy_of_all_logits(tiny_config, make_batch, params, monkeypatch):
    monkeypatch.setattr("crosslmm_jax.model.loss.LOGITS_AT_ONCE", 6)
    batch = make_batch(tiny_config, text=15)
    batch = batch._replace(loss_mask=batch.loss_mask * np.random.default_rng(0).random(batch.loss_mask.shape))

    def plain(params):
        logits = CrossLMM(tiny_config).apply({"params": params}, batch)[:, :-1]
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(log_p * batch.loss_mask[:, 1:])

    def ours(params):
        return CrossLMM(tiny_config).apply({"params": params}, batch, method="loss")[0]

    (a, da), (b, db) = jax.jit(lambda p: [jax.value_and_grad(f)(p) for f in (plain, ours)])(params)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), da, db)


@pytest.mark.slow
def test_no_program_holds_the_logits_of_a_long_sequence(tiny_config, replace_config, make_batch):
    config = replace_config(tiny_config, decoder={"vocab_size": 7919})
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    batch = make_batch(config, batch=1, frames=1, text=1500)
    loss = jax.jit(jax.grad(lambda p, b: CrossLMM(config).apply({"params": p}, b, method="loss")[0]))
    text = loss.lower(params, batch).compile().as_text()
    assert "500,7919]" in text.replace("512,7919]", "500,7919]")
    assert "1500,7919]" not in text and "1501,7919]" not in text


@pytest.mark.slow
def test_frames_in_chunks_equal_frames_at_once(tiny_config, replace_config, make_batch, params):
    batch = make_batch(tiny_config, batch=2, frames=5)
    results = []
    for chunk, keep in ((256, False), (3, False), (4, True)):
        config = replace_config(tiny_config, vision={"frame_chunk": chunk, "keep_features": keep})

        def loss(p, config=config):
            return CrossLMM(config).apply({"params": p}, batch, method="loss")[0]

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    for other in results[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-5), results[0], other)


@pytest.mark.slow
def test_text_only_batches_need_no_frames(tiny_config, make_batch, params):
    batch = make_batch(tiny_config, frames=0, text=8)
    logits = logits_of(tiny_config, params, batch)
    assert logits.shape == (2, 8, tiny_config.decoder.vocab_size)
    padded = make_batch(tiny_config, frames=2, text=8, valid_frames=(0, 0), valid_text=(8, 8))
    padded.visible_frames.counts[:] = 0
    padded.tokens[:, :8] = batch.tokens
    np.testing.assert_allclose(logits_of(tiny_config, params, padded)[:, :8], logits, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_stays_close_to_float32(tiny_config, make_batch, params):
    half = dataclasses.replace(tiny_config, compute_dtype="bfloat16")
    batch = make_batch(tiny_config)
    full, rough = logits_of(tiny_config, params, batch), logits_of(half, params, batch)
    assert rough.dtype == np.float32
    assert np.abs(full - rough).max() < 0.1 * np.abs(full).max()


def test_copied_cross_attention_starts_as_the_layers_self_attention(tiny_config):
    params = init_params(tiny_config, jax.random.key(0))
    layers = params["decoder"]["layers"]
    for direction in ("v2v", "t2v"):
        for name in ("wq", "bk", "wv", "wo"):
            assert np.array_equal(params[direction][name], layers[name][np.array([0, 2])])
