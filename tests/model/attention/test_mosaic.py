"""The encoder's attention kernel without a GPU: where it is chosen, that it lowers, how it is sharded.

`test_mosaic_gpu.py` runs the kernel on a GPU.
"""

import concurrent.futures
import contextlib
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.model.attention import cudnn, mosaic
from crosslmm_jax.model.attention.dispatch import _choose, attention, reference_attention
from crosslmm_jax.parallel import activation_rules, make_mesh

mosaic_kernel = pytest.importorskip(
    "crosslmm_jax.model.attention.mosaic_kernel", reason="this jax has no Mosaic GPU"
)
ENCODER = (4, 729, 2, 72)


def arrays(shape: Any = ENCODER, dtype: Any = jnp.bfloat16, count: int = 3) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(count)]


def stand_in(q: Any, k: Any, v: Any, *, read: int) -> Any:
    stop = jnp.full(q.shape[:2], read, jnp.int32)
    return reference_attention(q, k, v, jnp.zeros_like(stop), stop)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic, "_is_available", lambda: True)
    monkeypatch.setattr(mosaic, "_kernel", stand_in)
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")


@pytest.mark.parametrize(
    ("shape", "keys", "stop", "others", "expected"),
    [
        (ENCODER, ENCODER, None, {}, True),
        (ENCODER, ENCODER, np.full((4, 1), 700), {}, True),
        (ENCODER, ENCODER, np.array([[700], [700], [3], [700]]), {}, False),  # not the same for all rows
        (ENCODER, ENCODER, np.zeros((4, 1), int), {}, False),
        (ENCODER, ENCODER, np.full((4, 1), -1), {}, False),
        (ENCODER, ENCODER, np.full((4, 1), 1000), {}, True),  # all keys
        ((0, 729, 2, 72), (0, 729, 2, 72), None, {}, False),
        (ENCODER, ENCODER, jnp.full((4, 1), 700), {}, False),  # known only on the device
        (ENCODER, ENCODER, None, {"causal": True}, False),
        (ENCODER, ENCODER, None, {"kv_start": jnp.zeros((4, 729), jnp.int32)}, False),
        (ENCODER, (4, 729, 1, 72), None, {}, False),  # heads that share keys
        ((4, 729, 2, 64), (4, 729, 2, 64), None, {}, False),  # cuDNN pads nothing
        ((4, 729, 2, 128), (4, 729, 2, 128), None, {}, False),
        ((4, 9, 2, 72), ENCODER, None, {}, False),
    ],
)
def test_applies_to(
    on_hopper: None, shape: Any, keys: Any, stop: Any, others: dict[str, Any], expected: bool
) -> None:
    q, k = jnp.zeros(shape, jnp.bfloat16), jnp.zeros(keys, jnp.bfloat16)
    start = others.pop("kv_start", None)
    assert mosaic.is_applicable(q, k, start, stop, **others) == expected
    assert not mosaic.is_applicable(q.astype(jnp.float32), k.astype(jnp.float32), start, stop, **others)


def test_auto_takes_it_on_a_hopper_gpu_only(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = arrays()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _choose(q, k, None) == "mosaic"
    assert _choose(q, k, None, causal=True) == "cudnn"
    monkeypatch.setattr(mosaic, "_is_available", lambda: False)
    assert _choose(q, k, None) == "cudnn"


def test_error_where_it_does_not_apply() -> None:
    with pytest.raises(ValueError, match="backend 'mosaic' needs a Hopper GPU.*use 'auto'"):
        attention(*arrays(), backend="mosaic")


@pytest.mark.slow
def test_gradients_are_those_of_cudnn(on_hopper: None) -> None:
    q, k, v, weights = arrays((2, 70, 2, 72), jnp.bfloat16, 4)
    stop = np.full((2, 1), 65)

    def loss(q: Any, k: Any, v: Any, backend: Any) -> Any:
        return jnp.sum(weights * attention(q, k, v, kv_stop=stop, backend=backend).astype(jnp.float32))

    ours, expected = (jax.grad(loss, argnums=(0, 1, 2))(q, k, v, name) for name in ("mosaic", "cudnn"))
    for mine, other in zip(ours, expected, strict=True):
        assert jnp.any(other)
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}])
def test_every_device_computes_its_own_rows(on_hopper: None, axes: dict[str, int]) -> None:
    q, k, v = arrays((8, 70, 2, 72))
    stop, names = np.full((8, 1), 65), ("act_frames", None)
    expected = stand_in(q, k, v, read=65)
    with jax.set_mesh(make_mesh(MeshConfig(**axes))):
        attend = jax.jit(
            lambda q, k, v: attention(
                q, k, v, kv_stop=stop, backend="mosaic", rules=activation_rules(), axes=names
            )
        )
        out, expected = (x.astype(jnp.float32) for x in (attend(q, k, v), expected))
        np.testing.assert_allclose(out, expected, rtol=2**-7)  # one rounding of bfloat16
        assert "tensor<1x70x2x72xbf16>" in attend.lower(q, k, v).as_text()
        # Seven rows cannot be sharded evenly. Without rules, every device would gather all rows.
        assert not mosaic.is_applicable(q[:7], k[:7], rules=activation_rules(), axes=names)
        assert not mosaic.is_applicable(q, k)


@pytest.mark.parametrize(
    ("shape", "read"), [((2, 730, 730, 2, 72), 729), ((1, 64, 300, 3, 80), 129), ((1, 64, 64, 1, 72), 7)]
)
def test_lowers_for_a_gpu(shape: tuple[int, ...], read: int) -> None:
    kernel_shape = mosaic_kernel.KernelShape(*shape, read, "bfloat16", 132)
    assert "mosaic_gpu" in lowered_for_cuda(kernel_shape)


def lowered_for_cuda(shape: Any) -> str:
    q, kv = (
        jax.ShapeDtypeStruct((shape.batch, n, shape.heads, shape.size), shape.dtype)
        for n in (shape.queries, shape.keys)
    )
    kernel = mosaic_kernel.build.__wrapped__(shape)  # past the cache
    lowered = jax.jit(kernel).trace(q, kv, kv).lower(lowering_platforms=("cuda",))
    assert lowered.out_info.shape == q.shape
    return lowered.as_text()


@pytest.mark.slow
def test_threads_that_build_at_once_get_the_same_kernels() -> None:
    shapes = [mosaic_kernel.KernelShape(2 + i, 730, 730, 2, 72, 729, "bfloat16", 132) for i in range(4)] * 3
    alone = [lowered_for_cuda(shape) for shape in shapes[:4]]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lowered_for_cuda, shapes))
    assert together == alone * 3


def test_the_lowered_kernel_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic, "_is_available", lambda: True)
    rules, stop = activation_rules(), np.full((8, 1), 729)
    x = jax.ShapeDtypeStruct((8, 730, 2, 72), jnp.bfloat16)

    @jax.jit
    def layers(x: Any) -> Any:
        def layer(x: Any, _: None) -> Any:
            out = attention(
                x, x, x, kv_stop=stop, backend="mosaic", rules=rules, axes=("act_frames", None)
            )  # fmt: skip
            return out, None

        return jax.lax.scan(jax.checkpoint(layer), x, length=2)[0]

    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2, context=2))):
        text = layers.trace(x).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = re.findall(r"mosaic_gpu_v2.*?-> *(tensor<[^>]*>)", text, re.DOTALL)
    assert call == "tensor<1x730x2x72xbf16>"


@pytest.mark.parametrize("axes", [None, {"data": 8}])
def test_the_kernel_can_be_probed_within_a_trace(axes: dict[str, int] | None) -> None:
    """That is where a model first probes it: in a scanned layer of a program, under a mesh."""
    answers = []

    @jax.checkpoint
    def layer(x: Any, _: None) -> Any:
        answers.append(mosaic._can_be_built.__wrapped__())
        return x + 1, None

    program = jax.jit(lambda x: jax.lax.scan(layer, x, length=2)[0])
    with contextlib.nullcontext() if axes is None else jax.set_mesh(make_mesh(MeshConfig(**axes))):
        program.lower(jnp.zeros(8))
    assert answers and all(answers)


def test_cudnn_is_used_where_the_kernel_does_not_lower(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert mosaic._can_be_built.__wrapped__()

    def changed(shape: Any) -> Any:
        raise AttributeError("no attribute 'as_gpu_kernel'")

    monkeypatch.setattr(mosaic_kernel, "build", changed)
    with caplog.at_level(logging.WARNING):
        assert not mosaic._can_be_built.__wrapped__()
    assert "cuDNN is used instead" in caplog.text


def test_gradients_through_a_scan_of_layers_compiled_ahead(on_hopper: None) -> None:
    """As in training: no value of the trace of a layer may outlive it."""
    (x,) = arrays((2, 70, 2, 72), count=1)
    stop = np.full((2, 1), 65)

    def gradient(backend: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, _: None) -> Any:
            return x + attention(x, x, x, kv_stop=stop, backend=backend), None

        def loss(x: Any) -> Any:
            return jnp.sum(jax.lax.scan(layer, x, length=2)[0].astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss)).lower(x).compile()(x).astype(jnp.float32)

    np.testing.assert_array_equal(gradient("mosaic"), gradient("cudnn"))
