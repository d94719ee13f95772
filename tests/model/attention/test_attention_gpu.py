"""On a GPU: every attention backend against the float32 definition, forward and gradients.

Programs take the ranges of keys as arguments, so that one serves many draws. All are compiled at once on
several threads, since compiling takes nearly all the time. To keep the errors that were measured:

    XLA_FLAGS=--xla_force_host_platform_device_count=1 JAX_PLATFORMS=cuda,cpu \\
        pytest -m gpu tests/model/attention/test_attention_gpu.py \\
            --gpu-report docs/results/h200_gpu_tests.json
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.batch import VisibleFrames
from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model import init_params
from crosslmm_jax.model.attention import cudnn, video_attention
from crosslmm_jax.model.attention.blockwise import blockwise_attention
from crosslmm_jax.model.attention.dispatch import _choose, attention, reference_attention
from crosslmm_jax.model.dual_cross_attention import cross_attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

# Norm of the difference over that of the reference: bfloat16 operands, products summed in float32.
TOLERANCE = 1e-2
THREADS = os.cpu_count() or 8
BATCH, DRAWS = 2, 3
# queries, keys, heads, key heads, head size
SHAPES = {
    "encoder": (729, 729, 4, 4, 72),
    "decoder": (333, 333, 6, 2, 128),
    "v2v": (180, 20 * 729, 6, 2, 128),
    "t2v": (33, 21 * 729, 6, 2, 128),
    "one_token": (1, 21 * 729, 6, 2, 128),
}
CHOICES = {"encoder": "cudnn", "decoder": "cudnn", "v2v": "cudnn", "t2v": "cudnn", "one_token": "plain"}
# What queries read: form of the call -> kinds of ranges that it is tested with.
KINDS = {
    "all": ("all",),
    "causal": ("causal",),
    "stop": ("all", "one_medium", "several_media"),
    "range": ("all", "one_medium", "several_media", "window"),
}
FORMS = [
    *(("cudnn", name, "stop") for name in SHAPES),
    *(("cudnn", name, form) for name in ("encoder", "decoder") for form in ("all", "causal")),
    *((backend, name, "range") for backend in ("blockwise", "plain") for name in SHAPES),
    *(("blockwise", name, "causal") for name in ("decoder",)),
]


def ranges(kind: str, queries: int, keys: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """int32[B, T] first key that each query reads, and one past its last."""
    start = np.zeros((BATCH, queries))
    if kind == "all":
        stop = np.full((BATCH, queries), keys)
    elif kind == "causal":
        stop = np.tile(np.arange(1, queries + 1), (BATCH, 1))
    elif kind == "one_medium":  # a query reads nothing, or the same keys as the others of its row
        stop = np.repeat(rng.integers(1, keys + 1, (BATCH, 1)), queries, axis=1)
        stop[:, : rng.integers(0, queries // 2 + 1)] = 0
    else:
        stop = np.sort(rng.integers(0, keys + 1, (BATCH, queries)), axis=1)
    if kind == "window":
        start = np.maximum(stop - rng.integers(0, keys // 2, (BATCH, queries)), 0)
    return start.astype(np.int32), stop.astype(np.int32)


def with_gradients(attend: Any) -> Any:
    """(q, k, v, gradient of the output, ranges) -> output and gradients, float32."""

    def both(q: Any, k: Any, v: Any, d_out: Any, start: Any, stop: Any) -> list[Any]:
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, start, stop), q, k, v)
        return [x.astype(jnp.float32) for x in (out, *backward(d_out))]

    return both


def program(backend: str, form: str) -> Any:
    """One attention as the model calls it."""

    def attend(q: Any, k: Any, v: Any, start: Any, stop: Any) -> Any:
        bounds = {"stop": {"kv_stop": stop}, "range": {"kv_start": start, "kv_stop": stop}}.get(form, {})
        return attention(q, k, v, causal=form == "causal", backend=backend, **bounds)

    return with_gradients(reference_attention if backend == "reference" else attend)


def arguments(name: str, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    queries, keys, heads, kv_heads, size = SHAPES[name]
    q, kv = (BATCH, queries, heads, size), (BATCH, keys, kv_heads, size)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, kv, kv, q)]
    return [*arrays, *[jax.ShapeDtypeStruct((BATCH, queries), jnp.int32)] * 2]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str, str], Any]:
    """All programs."""
    chosen = [("reference", name, "range") for name in SHAPES] + FORMS
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        waiting = {}
        for backend, name, form in chosen:
            dtype = jnp.float32 if backend == "reference" else jnp.bfloat16
            lowered = jax.jit(program(backend, form)).lower(*arguments(name, dtype))
            waiting[backend, name, form] = pool.submit(lowered.compile)
        return {key: future.result() for key, future in waiting.items()}


@pytest.mark.parametrize(("backend", "name", "form"), FORMS)
def test_backends_equal_the_definition_forward_and_backward(
    compiled: dict[tuple[str, str, str], Any], record_property: Any, backend: str, name: str, form: str
) -> None:
    queries, keys, *_ = SHAPES[name]
    rng = np.random.default_rng(np.frombuffer(f"{backend}{form}{name}".encode(), np.uint8))
    worst = 0.0
    for kind, _ in itertools.product(KINDS[form], range(DRAWS)):
        bounds = ranges(kind, queries, keys, rng)
        arrays = [
            jnp.asarray(rng.standard_normal(x.shape, np.float32)).astype(jnp.bfloat16)
            for x in arguments(name, jnp.bfloat16)[:4]
        ]
        found = compiled[backend, name, form](*arrays, *bounds)
        wide = [x.astype(jnp.float32) for x in arrays]
        expected = compiled["reference", name, "range"](*wide, *bounds)
        for got, wanted in zip(found, expected, strict=True):
            worst = max(worst, relative_error(got, wanted))
    record_property("error", worst)
    assert worst < TOLERANCE


@pytest.mark.parametrize("kind", ["all", "one_medium", "several_media"])
@pytest.mark.parametrize("name", ["t2v", "v2v", "one_token"])
def test_split_k_equals_the_definition(record_property: Any, name: str, kind: str) -> None:
    """Without gradients, blocks that do not fill the GPU split the keys.

    Keys grow along the video, so that the weights of splits differ by orders of magnitude: a log-sum-exp that
    is rounded to bfloat16 would be off by several percent.
    """
    q, k, *_ = arguments(name, jnp.bfloat16)
    splits, keys = cudnn.best_num_splits(q.shape, k.shape), k.shape[1]
    assert splits > 1
    rng = np.random.default_rng(len(kind))
    growth = np.linspace(0.2, 3, keys, dtype=np.float32)[:, None, None]
    worst = 0.0
    run = jax.jit(lambda q, k, v, stop: attention(q, k, v, kv_stop=stop, backend="cudnn"))
    exact = jax.jit(reference_attention)
    for _ in range(DRAWS):
        start, stop = ranges(kind, q.shape[1], keys, rng)
        arrays = [rng.standard_normal(x.shape, np.float32) for x in arguments(name, jnp.bfloat16)[:3]]
        arrays[1] *= growth
        arrays = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
        got = run(*arrays, stop).astype(jnp.float32)
        wanted = exact(*(x.astype(jnp.float32) for x in arrays), start, stop)
        worst = max(worst, relative_error(got, wanted))
        if kind == "all":  # as where it is known at compile time
            got = run(*arrays, None).astype(jnp.float32)
            worst = max(worst, relative_error(got, wanted))
        if kind == "one_medium":
            length = jnp.max(stop, axis=1)
            _, lse = jax.jit(cudnn.split_attention, static_argnums=4)(*arrays, length, splits)
            _, expected = blockwise_attention(
                *(x.astype(jnp.float32) for x in arrays), start, np.repeat(length[:, None], q.shape[1], 1),
                q.shape[-1] ** -0.5,
            )  # fmt: skip
            assert float(jnp.max(jnp.abs(lse - expected))) < 5e-3
    record_property("error", worst)
    record_property("splits", splits)
    assert worst < TOLERANCE


def relative_error(got: Any, wanted: Any) -> float:
    assert bool(jnp.all(jnp.isfinite(got)))
    return float(jnp.linalg.norm(jnp.ravel(got - wanted)) / jnp.linalg.norm(jnp.ravel(wanted)))


@pytest.mark.parametrize("name", SHAPES)
def test_the_choice_of_auto_is_tested_above(name: str) -> None:
    q, k, *_ = arguments(name, jnp.bfloat16)

    def choice(batch: int, stops: int) -> str:
        queries, keys = (jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in (q, k))
        return _choose(queries, keys, None, jax.ShapeDtypeStruct((batch, stops), jnp.int32))

    assert choice(1, 1) == CHOICES[name]
    assert choice(1, q.shape[1]) == "plain"  # a range per query and small scores: all scores at once
    assert choice(64, q.shape[1]) == CHOICES[name]


def small_2b(scope: str, backend: str, dtype: str) -> ModelConfig:
    """The heads and patches of the 2B model, and a narrower decoder."""
    config = presets.crosslmm_2b()
    return dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, width=256, num_layers=4, vocab_size=512),
        cross_attention=dataclasses.replace(
            config.cross_attention, v2v_scope=scope, v2v_window=2, gate_init=0.5
        ),
        attention=backend,
        compute_dtype=dtype,
    )


@pytest.mark.parametrize("scope", ["video", "frame", "window"])
def test_long_videos_in_chunks_equal_the_whole_in_float32(
    monkeypatch: pytest.MonkeyPatch, record_property: Any, scope: str
) -> None:
    """V2V of one layer over 13 frames, of which 11 are valid, in chunks of 4 or 5."""
    frames, valid = 13, 11
    config = small_2b(scope, "auto", "bfloat16")
    weights = jax.tree.map(lambda w: w[0], init_params(config, jax.random.key(0))["v2v"])
    rng, c = np.random.default_rng(0), config.merge.tokens_per_frame
    x = rng.standard_normal((1, frames * c, 256)).astype(np.float32)
    tokens = rng.standard_normal((1, frames, config.vision.num_patches, 256)).astype(np.float32)
    frame = np.repeat(np.arange(frames), c)[None]
    visible = VisibleFrames(np.where(frame < valid, valid, 0).astype(np.int32))
    seen = {"visible_frames": visible, "times": frame}

    def update(config: ModelConfig, weights: Any, x: Any, tokens: Any) -> Any:
        return cross_attend(weights, x, tokens, config=config, scoped=True, **seen)

    def run(config: ModelConfig) -> Any:
        dtype = jnp.dtype(config.compute_dtype)
        arrays = jax.tree.map(lambda a: jnp.asarray(a, dtype), ({**weights}, x, tokens))
        return jax.jit(functools.partial(update, config))(*arrays).astype(jnp.float32)

    expected = run(small_2b(scope, "reference", "float32"))
    kv_bytes = 2 * 2 * config.vision.num_patches * config.decoder.num_kv_heads * config.decoder.head_dim
    monkeypatch.setattr(video_attention, "MAX_WHOLE_KV_BYTES", 4 * kv_bytes)
    monkeypatch.setattr(video_attention, "CHUNK_BYTES", 4 * kv_bytes)
    error = relative_error(run(config), expected)
    record_property("error", error)
    assert error < 2 * TOLERANCE  # one more product in bfloat16 than an attention


def test_more_elements_of_keys_than_int32_counts(record_property: Any) -> None:
    """2^31 elements in the keys of one head, as of 23,000 frames: the last keys are found."""
    keys, size, last = 2**24 + 2**18, 128, 1024
    direction = jnp.ones((size,), jnp.bfloat16)

    @jax.jit
    def arrays() -> Any:
        k = jax.lax.map(
            lambda key: jax.random.normal(key, (2**18, size), jnp.bfloat16),
            jax.random.split(jax.random.key(0, impl="rbg"), keys // 2**18),
        ).reshape(1, keys, 1, size)
        q = jnp.broadcast_to(direction, (1, 256, 6, size))
        v = jnp.roll(k, 1, axis=1)
        return q, k.at[:, -last:].set(3 * direction), v

    q, k, v = arrays()
    assert k.size > 2**31
    stop = jnp.full(q.shape[:2], keys, jnp.int32)
    attend = functools.partial(attention, backend="cudnn")
    out = jax.jit(lambda q, k, v, stop: attend(q, k, v, kv_stop=stop))(q, k, v, stop)
    # Scores are 34 for the last keys and below 6 for the others.
    expected = jnp.mean(v[0, -last:, 0].astype(jnp.float32), axis=0)
    error = relative_error(out.astype(jnp.float32), jnp.broadcast_to(expected, out.shape))
    record_property("error", error)
    assert error < TOLERANCE
