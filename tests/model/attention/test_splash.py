"""The TPU backend: its kernel in Pallas's interpreter against the definition, and lowered for a TPU."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from crosslmm_jax import presets
from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.model import CrossLMM, init_params
from crosslmm_jax.model.attention import splash as splash_module
from crosslmm_jax.model.attention.blockwise import BlockSizes
from crosslmm_jax.model.attention.dispatch import _choose, attention, reference_attention
from crosslmm_jax.model.attention.splash import splash_attention
from crosslmm_jax.model.flops import Workload
from crosslmm_jax.parallel import activation_rules, make_mesh
from crosslmm_jax.profiling.inputs import param_shapes, random_prompt, shapes_of

BLOCKS = BlockSizes(128, 256)
# (batch, queries, keys, key heads, query heads per key head, head size, with a start). Few compiled shapes,
# so that there can be many examples: several blocks of both, a padded head size, few and many queries.
SHAPES = [
    (2, 70, 300, 2, 3, 72, True),
    (1, 300, 520, 1, 1, 16, False),
    (2, 3, 700, 2, 2, 8, False),
    (1, 150, 256, 1, 2, 40, True),
]


@functools.cache
def value_and_gradients(shape: int, ours: bool) -> Any:
    with_start = SHAPES[shape][-1]

    def loss(q: Any, k: Any, v: Any, start: Any, stop: Any, weights: Any) -> Any:
        if ours:
            out = splash_attention(q, k, v, start if with_start else None, stop, BLOCKS)
        else:
            out = reference_attention(q, k, v, start, stop)
        return jnp.sum(weights * out), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def draw_ranges(rng: np.random.Generator, kind: str, batch: int, length: int, keys: int) -> Any:
    """Ranges as in the model, and ranges without any order."""
    stop = rng.integers(0, keys + 1, (batch, length))
    if kind == "media":  # few different ones, growing
        stop = np.sort(rng.choice(rng.integers(0, keys + 1, 3), (batch, length)), axis=1)
    elif kind == "one":
        stop = np.where(np.arange(length) < length // 3, 0, stop[:, :1])
    elif kind == "nothing":
        stop = np.zeros((batch, length))
    start = np.minimum(rng.integers(0, keys + 1, (batch, length)), stop) * (rng.random((batch, length)) < 0.7)
    return start.astype(np.int32), stop.astype(np.int32)


@pytest.mark.slow
@settings(max_examples=24, deadline=None)
@given(
    seed=st.integers(0, 2**31), shape=st.integers(0, len(SHAPES) - 1),
    kind=st.sampled_from(["any", "media", "one", "nothing"]),
)  # fmt: skip
def test_equals_reference_forward_and_backward(seed: int, shape: int, kind: str) -> None:
    batch, length, keys, kv_heads, groups, size, with_start = SHAPES[shape]
    rng = np.random.default_rng(seed)
    q, weights = (rng.standard_normal((batch, length, kv_heads * groups, size), np.float32) for _ in range(2))
    k, v = (rng.standard_normal((batch, keys, kv_heads, size), np.float32) for _ in range(2))
    start, stop = draw_ranges(rng, kind, batch, length, keys)
    start = start if with_start else np.zeros_like(stop)
    (_, ours), our_gradients = value_and_gradients(shape, True)(q, k, v, start, stop, weights)
    (_, expected), gradients = value_and_gradients(shape, False)(q, k, v, start, stop, weights)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.all(np.asarray(ours)[stop <= start] == 0)
    for mine, other in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [729, 128])
def test_everything_and_causal(length: int) -> None:
    """Without ranges, padded to blocks or not; bfloat16 as the model runs it."""
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.standard_normal((1, length, 2, 72)), jnp.bfloat16) for _ in range(3))
    for causal in (False, True):
        both = [attention(q, k, v, causal=causal, backend=name) for name in ("splash", "reference")]
        ours, expected = (np.asarray(x, np.float32) for x in both)
        np.testing.assert_allclose(ours, expected, atol=0.03)
        assert np.mean(np.abs(ours - expected)) < 1e-3


@pytest.mark.slow
def test_blocks_that_no_query_reads_are_skipped() -> None:
    """The map of blocks follows from the ranges, and the kernel obeys it."""
    stop = jnp.repeat(jnp.array([[0, 130, 256]]), 128, axis=1)
    runs = splash_module._block_map(None, stop, 384, block_q=128, block_kv=128)
    assert runs is not None
    assert runs.tolist() == [[True, False, False], [True, True, False], [True, True, False]]
    start = jnp.repeat(jnp.array([[0, 128, 140]]), 128, axis=1)
    runs = splash_module._block_map(start, stop, 384, block_q=128, block_kv=128)
    assert runs is not None
    assert runs.tolist() == [[True, False, False], [False, True, False], [False, True, False]]
    assert splash_module._mask_info(runs, axis=1).data_next.tolist() == [[[0, 0, 0], [1, 1, 1], [1, 1, 1]]]
    assert splash_module._mask_info(runs, axis=0).data_next.tolist() == [[[0, 1, 0], [0, 1, 0], [0, 2, 0]]]
    # Keys that are not read may be NaN: a block that ran would spread it, masked or not.
    q = jnp.ones((1, 4, 1, 8))
    k = jnp.ones((1, 512, 1, 8)).at[:, 256:].set(jnp.nan)
    out = splash_attention(q, k, k, None, jnp.full((1, 4), 200), BlockSizes(128, 256))
    assert np.all(np.asarray(out) == 1)


@pytest.mark.slow
def test_without_a_map_of_blocks_that_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash_module, "MAX_MAPPED_BLOCKS", 1)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 9, 2, 8), np.float32), rng.standard_normal((1, 500, 1, 8), np.float32)
    stop = np.array([[0, 1, 2, 255, 256, 257, 499, 500, 0]], np.int32)

    def loss(attend: Any, q: Any, k: Any) -> Any:
        return jnp.sum(attend(q, k, k) ** 2)

    ours = functools.partial(loss, lambda *x: splash_attention(*x, None, jnp.asarray(stop), BLOCKS))
    theirs = functools.partial(loss, lambda *x: reference_attention(*x, jnp.zeros_like(stop), stop))
    for mine, other in zip(jax.grad(ours, (0, 1))(q, k), jax.grad(theirs, (0, 1))(q, k), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


@pytest.mark.slow
def test_too_many_keys_for_ranges_with_a_start() -> None:
    q, k = jnp.zeros((1, 2, 1, 8)), jnp.zeros((1, 2**16, 1, 8))
    ranges = {"kv_start": jnp.zeros((1, 2), jnp.int32), "kv_stop": jnp.ones((1, 2), jnp.int32)}
    with pytest.raises(ValueError, match="at most 65535 keys, not 65536; use 'auto'"):
        attention(q, k, k, backend="splash", **ranges)
    assert attention(q, k[:, 1:], k[:, 1:], backend="splash", **ranges).shape == q.shape


def test_choice_on_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")

    def choice(length: int, keys: int, *, ranged: bool = False) -> str:
        q, k = (
            jax.ShapeDtypeStruct((1, n, heads, 128), jnp.bfloat16) for n, heads in ((length, 12), (keys, 2))
        )
        start: Any = jax.ShapeDtypeStruct((1, length), jnp.int32) if ranged else None
        return _choose(q, k, start)  # type: ignore[arg-type]

    assert choice(2304, 186_624) == choice(64, 186_624) == choice(2368, 2368) == "splash"
    assert choice(1, 1_866_240) == "plain", "one token would be a block of padding"
    assert choice(72, 17_496, ranged=True) == "splash"
    assert choice(720, 174_960, ranged=True) == "blockwise", "ranges with a start, too many keys"
    assert choice(16, 64) == "reference"


# ---- the whole model ----


def head_size_72(config: ModelConfig) -> ModelConfig:
    """The tiny model with heads of 72 in its encoder, and few layers: interpreting takes long."""
    vision = dataclasses.replace(config.vision, width=144, num_heads=2, num_layers=2)
    decoder = dataclasses.replace(config.decoder, num_layers=2)
    return dataclasses.replace(config, vision=vision, decoder=decoder, compute_dtype="float32")


def with_backend(config: ModelConfig, name: Any) -> ModelConfig:
    return dataclasses.replace(config, attention=name)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["video", "window"])
def test_the_model_equals_reference(
    scope: str, tiny_config: ModelConfig, replace_config: Any, make_batch: Any
) -> None:
    """Loss and all gradients; rows of different lengths, text before and after the video."""
    cross = {"v2v_scope": scope, "v2v_window": 1}
    config = replace_config(head_size_72(tiny_config), cross_attention=cross)
    params = init_params(config, jax.random.key(0))
    batch = make_batch(config, valid_frames=(4, 2), valid_text=(10, 7))

    def loss(params: Any, name: str) -> Any:
        total, count = CrossLMM(with_backend(config, name)).apply({"params": params}, batch, method="loss")
        return total / count

    (ours, our_grads), (expected, grads) = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, name) for name in ("splash", "reference")
    )
    assert float(ours) == pytest.approx(float(expected), abs=1e-5)
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(our_grads), jax.tree.leaves(grads), strict=True
    ):
        np.testing.assert_allclose(mine, other, atol=1e-5, err_msg=jax.tree_util.keystr(path))


# ---- lowered for a TPU, where there is none ----


def lowered_for_tpu(function: Any, *shapes: Any) -> str:
    return export.export(jax.jit(function), platforms=["tpu"])(*shapes).mlir_module()


def prefill_of(config: ModelConfig, rules: Any = None) -> Any:
    model = CrossLMM(config, rules)

    def prefill(params: Any, frames: Any, batch: Any) -> Any:
        visual = model.apply({"params": params}, frames, method="encode")
        counts = jnp.full(batch.tokens.shape[:1], batch.tokens.shape[1], jnp.int32)
        room = batch.tokens.shape[1] + 64
        return model.apply({"params": params}, visual, batch, counts, cache_size=room, method="prefill")

    return prefill


def prompt_shapes(config: ModelConfig, frames: int, rows: int = 1) -> tuple[Any, Any]:
    batch = random_prompt(config, Workload(frames=frames, text=64, before=16))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    return shapes.frames, shapes._replace(frames=None, loss_mask=None)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["video", "window"])
def test_prefill_at_real_size_lowers_for_a_tpu(scope: Any, replace_config: Any) -> None:
    config = replace_config(presets.crosslmm_2b(), cross_attention={"v2v_scope": scope}, attention="splash")
    shapes = prompt_shapes(config, 64)
    text = lowered_for_tpu(prefill_of(config), param_shapes(config, stacked=True), *shapes)
    # Encoder, self-attention, V2V and T2V: compiled kernels, not interpreted.
    assert text.count("tpu_custom_call") >= 4
    assert "16x768x128xbf16" in text, "729 patches of 16 heads of 72, padded to tiles"


@pytest.mark.slow
def test_training_lowers_for_a_tpu(replace_config: Any) -> None:
    config = replace_config(presets.crosslmm_2b(), attention="splash")
    batch = shapes_of(random_prompt(config, Workload(frames=8, text=64, before=16)))

    def gradient(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            return CrossLMM(config).apply({"params": params}, batch, method="loss")[0]

        return jax.grad(loss)(params)

    text = lowered_for_tpu(gradient, param_shapes(config, stacked=True), batch)
    assert all(f"splash_mha_{phase}" in text for phase in ("fwd_residuals", "dq_no", "dkv_no"))


@pytest.mark.slow
def test_every_tpu_runs_the_kernel_on_its_own_rows(replace_config: Any) -> None:
    """The compiler refuses to shard a kernel, so `map_devices` must; 8 devices, three axes."""
    config = replace_config(presets.crosslmm_2b(), attention="splash")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    frames, batch = prompt_shapes(config, 8, rows=4)
    with jax.set_mesh(mesh):
        text = lowered_for_tpu(
            prefill_of(config, activation_rules()), param_shapes(config, stacked=True), frames, batch
        )
    assert text.count("tpu_custom_call") >= 4


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}])
def test_sharded_over_devices_equals_one(
    axes: dict[str, int], tiny_config: ModelConfig, make_batch: Any
) -> None:
    """Interpreted on 8 devices: rows and heads that divide, and rows that do not."""
    config = head_size_72(tiny_config)
    params, batch = init_params(config, jax.random.key(0)), make_batch(config, batch=4)
    expected = jax.jit(CrossLMM(with_backend(config, "reference")).apply)({"params": params}, batch)
    mesh = make_mesh(MeshConfig(**axes))
    with jax.set_mesh(mesh):
        ours = jax.jit(CrossLMM(with_backend(config, "splash"), activation_rules()).apply)(
            {"params": params}, batch
        )
    np.testing.assert_allclose(ours, expected, atol=2e-5)
