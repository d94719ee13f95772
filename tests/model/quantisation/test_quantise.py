"""Products in 8 bits: against float64, within the error of rounding; and where they are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax import presets
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.inference.prepare import prepare_params
from crosslmm_jax.model import (
    CrossLMM,
    init_params,
    logical_axes,
    quantise_params,
    quantised_axes,
    separate_layers,
)
from crosslmm_jax.model.quantisation.quantise import (
    DTYPES,
    SMALLEST,
    QuantisedRows,
    largest,
    linear,
    operand,
    power_of_two,
    quantise,
    quantise_by,
    quantised_product,
)
from crosslmm_jax.parallel.axis_rules import activation_rules
from crosslmm_jax.parallel.mesh import make_mesh
from crosslmm_jax.parallel.sharding import param_shardings

PRECISIONS = ("fp8", "int8")
BFLOAT16 = 2.0**-8  # relative error of one rounding


def rounding(x: np.ndarray, scale: np.ndarray, precision: str) -> np.ndarray:
    """Largest change of a number by rounding to 8 bits: half a step, in e4m3 that of its binade."""
    if precision == "int8":
        return np.broadcast_to(scale * 0.5, x.shape)
    return np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-10)


def check_product(x: np.ndarray, w: np.ndarray, precision: str, got: np.ndarray, kept: float) -> None:
    """`got` is x @ w up to rounding of both operands, of float32 sums, and `kept`, of the output."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    top = largest(DTYPES[precision])
    x_scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), SMALLEST) / top
    w_scale = np.maximum(np.abs(w).max(axis=0, keepdims=True), SMALLEST) / top
    dx, dw = rounding(x, x_scale, precision), rounding(w, w_scale, precision)
    ax, aw = np.abs(x), np.abs(w)
    bound = dx @ aw + ax @ dw + dx @ dw
    bound += (kept + (len(w) + 8) * 2.0**-24) * ((ax + dx) @ (aw + dw))
    assert np.all(np.abs(got - x @ w) <= bound * 1.001 + 1e-37)


@st.composite
def operands(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Rows of very different magnitude, some zero, some with one huge number; columns likewise.

    Their products stay within float32. Few shapes, since each is compiled.
    """
    rows, inputs, outputs = draw(st.sampled_from([(1, 1, 1), (3, 17, 4), (5, 70, 9)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.standard_normal((rows, inputs)) * 10.0 ** rng.integers(-12, 11, (rows, 1))
    w = rng.standard_normal((inputs, outputs)) * 10.0 ** rng.integers(-12, 11, (1, outputs))
    x[rng.random(rows) < 0.2] = 0
    w[:, rng.random(outputs) < 0.2] = 0
    x[:, rng.integers(inputs)] *= draw(st.sampled_from([1, 20, 1e6]))
    w[rng.integers(inputs)] *= draw(st.sampled_from([1, 20, 1e6]))
    return x.astype(np.float32), w.astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=40, deadline=None)
@given(operands())
def test_a_product_is_as_exact_as_its_rounding(precision: str, pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = pair
    rows = QuantisedRows(*quantise(jnp.asarray(x), DTYPES[precision], -1))
    weight, scale = quantise(jnp.asarray(w.T), DTYPES[precision], -1)
    got = np.asarray(quantised_product(rows, weight, scale, dtype=jnp.float32), np.float64)
    assert np.all(np.isfinite(got))
    assert np.all(got[np.all(x == 0, axis=1)] == 0)
    check_product(x, w, precision, got, kept=0)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(operands())
def test_a_product_with_one_scale_is_as_exact_as_its_rounding(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Scales are powers of two, up to twice what is needed: small numbers reach e4m3's last bits."""
    x, w = pair
    dtype = DTYPES["fp8"]
    x_scale, w_scale = (power_of_two(jnp.max(jnp.abs(jnp.asarray(a))), dtype) for a in (x, w))
    weights = {"w1": quantise_by(jnp.asarray(w.T), w_scale, dtype), "w1_scale": w_scale}
    weights |= {"w1_input_scale": x_scale, "b1": jnp.arange(w.shape[1], dtype=jnp.float32)}
    got = np.asarray(linear(operand(jnp.asarray(x), weights, "w1"), weights, "w1", "b1"), np.float64)
    x, w = x.astype(np.float64), w.astype(np.float64)
    dx, dw = rounding(x, np.asarray(x_scale), "fp8"), rounding(w, np.asarray(w_scale), "fp8")
    ax, aw = np.abs(x), np.abs(w)
    bias = np.arange(w.shape[1])
    bound = dx @ aw + ax @ dw + dx @ dw + (len(w) + 8) * 2.0**-24 * ((ax + dx) @ (aw + dw) + bias)
    assert np.all(np.abs(got - (x @ w + bias)) <= bound * 1.001 + 1e-37)


def test_the_least_power_of_two() -> None:
    bounds = np.array([448, 449, 447, 224, 1e-3, 3e38, 0, np.nan, np.inf], np.float32)
    got = np.asarray(power_of_two(jnp.asarray(bounds), DTYPES["fp8"]))
    finite = got[:6]
    assert np.array_equal(np.exp2(np.round(np.log2(finite))), finite)
    assert np.all(bounds[:6] <= 448.0 * finite.astype(np.float64))
    assert np.all(bounds[:6] > 224.0 * finite.astype(np.float64))
    np.testing.assert_array_equal(finite, np.asarray(jnp.asarray(finite).astype(jnp.bfloat16), np.float32))
    assert 0 < got[6] < 1e-30 and not np.any(np.isfinite(got[7:]))


def test_numbers_beyond_the_range_are_clipped() -> None:
    x = jnp.asarray([1000.0, -1000.0, np.inf, 447.0, np.nan], jnp.bfloat16)
    got = np.asarray(quantise_by(x, jnp.float32(1), DTYPES["fp8"]), np.float32)
    np.testing.assert_array_equal(got, [448, -448, 448, 448, np.nan])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_the_sums_are_rounded_to_bfloat16(precision: str) -> None:
    """At the width of the MLP, where sums in bfloat16 would have large errors."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.abs(rng.standard_normal((8, 4304))), jnp.bfloat16)
    w = np.abs(rng.standard_normal((4304, 32))).astype(np.float32)
    weight, scale = quantise(jnp.asarray(w.T), DTYPES[precision], -1)
    weights = {"w2": weight, "w2_scale": scale, "b2": jnp.zeros(32, jnp.bfloat16)}
    got = linear(operand(x, weights, "w2"), weights, "w2", "b2")
    assert got.dtype == jnp.bfloat16
    check_product(np.asarray(x, np.float32), w, precision, np.asarray(got, np.float64), kept=2 * BFLOAT16)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_largest_numbers_and_the_smallest(precision: str) -> None:
    huge = float(jnp.finfo(jnp.bfloat16).max)
    x = jnp.asarray([[huge, -huge, 1.0], [1e-38, 0.0, 0.0], [-0.0, 0.0, 0.0]], jnp.bfloat16)
    values, scale = quantise(x, DTYPES[precision], -1)
    restored = np.asarray(values, np.float32) * np.asarray(scale)
    np.testing.assert_allclose(restored[0], [huge, -huge, 0], rtol=1e-6)
    np.testing.assert_allclose(restored[1:], 0, atol=SMALLEST)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_affect_only_their_row(precision: str, bad: float) -> None:
    x = np.ones((3, 16), np.float32)
    x[1, 5] = bad
    weight, scale = quantise(jnp.ones((4, 16)), DTYPES[precision], -1)
    rows = QuantisedRows(*quantise(jnp.asarray(x), DTYPES[precision], -1))
    got = np.asarray(quantised_product(rows, weight, scale, dtype=jnp.float32))
    assert not np.any(np.isfinite(got[1]))
    np.testing.assert_allclose(got[[0, 2]], 16, rtol=1e-6)


# The encoder and the projector ------------------------------------------------------------------


def real_widths(layers: int = 2) -> tuple:
    """so400m's widths and few of its layers, the 2B model's projector; weights in bfloat16 and frames."""
    config = presets.crosslmm_2b()
    decoder = dataclasses.replace(config.decoder, num_layers=1, vocab_size=8, mlp_width=8)
    vision = dataclasses.replace(config.vision, num_layers=layers + 1)
    config = dataclasses.replace(config, vision=vision, decoder=decoder)
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    # Smooth pictures: neighbouring patches are alike, as in real frames.
    coarse = np.random.default_rng(0).integers(0, 256, (1, 1, 12, 12, 3), dtype=np.uint8)
    return config, params, coarse.repeat(32, axis=2).repeat(32, axis=3)


def encode(config, params, frames):
    return jax.jit(lambda p: CrossLMM(config).apply({"params": p}, frames, method="encode"))(params)


@pytest.mark.slow
def test_tokens_at_real_widths_stay_close_to_float32() -> None:
    """Each rounding is random: e4m3's moves a number by 2.6% in the mean, int8's by half a 127th of its row's
    largest, some 1%; a layer's products add theirs to a residual stream that is larger than what they add."""
    config, params, frames = real_widths()
    wide = dataclasses.replace(config, compute_dtype="float32")
    expected = np.asarray(encode(wide, params, frames).originals).reshape(-1, 1536)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    errors = {}
    for precision in ("compute", *PRECISIONS):
        chosen = dataclasses.replace(config, visual_matmul=precision)
        visual = encode(chosen, quantise_params(narrow, precision), frames)
        got = np.asarray(visual.originals, np.float32).reshape(expected.shape)
        errors[precision] = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        cosines = (
            np.sum(got * expected, axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
        )
        assert cosines.min() > {"compute": 0.9998, "int8": 0.998, "fp8": 0.99}[precision]
    assert errors["compute"] < errors["int8"] < errors["fp8"] < 0.1


def lowered_encode(config, precision: str) -> list[str]:
    config = dataclasses.replace(config, visual_matmul=precision)
    params = jax.eval_shape(lambda: quantise_params(init_params(config, jax.random.key(0)), precision))
    frames = jax.ShapeDtypeStruct((1, 2, 32, 32, 3), jnp.uint8)
    encode = jax.jit(lambda p, f: CrossLMM(config).apply({"params": p}, f, method="encode"))
    return encode.lower(params, frames).as_text().splitlines()


@pytest.mark.parametrize(("precision", "dtype", "count"), [("fp8", "f8E4M3FN", 4), ("int8", "i8", 6 + 4)])
def test_only_products_of_quantised_matrices_are_in_8_bits(tiny_config, precision, dtype, count) -> None:
    """In what the compiler is handed: q, k, v, o and the MLP of the one layer body for int8; the projector
    twice (for pooled and original tokens), each summing over the last dimension of both."""
    lines = [line for line in lowered_encode(tiny_config, precision) if "dot_general" in line]
    narrow = [line for line in lines if f"x{dtype}>, tensor<" in line]
    assert len(narrow) == count
    assert all("contracting_dims = [2] x [1]" in line or "[1] x [1]" in line for line in narrow)
    others = [line for line in lines if line not in narrow]
    assert len(others) == (6 + 4 - count) + 1 + 2 + 1, "patch embedding, scores and what they weigh, pool"
    assert not any(dtype in line for line in others)


def test_the_encoders_fp8_products_have_the_form_that_xla_rewrites(tiny_config) -> None:
    """Both operands of all six are fp8 and converted, then scaled at once."""
    lines = lowered_encode(tiny_config, "fp8")
    converts = [i for i, line in enumerate(lines) if "stablehlo.convert" in line and "f8E4M3FN>) ->" in line]
    assert len(converts) == 2 * 6
    for i in converts:
        name = lines[i].split()[0]
        reader = next(line for line in lines[i + 1 :] if f"{name}," in line or f"{name} " in line)
        assert "stablehlo.multiply" in reader


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_refused(tiny_config, make_batch, precision: str) -> None:
    config = dataclasses.replace(tiny_config, visual_matmul=precision)
    quantised = quantise_params(init_params(config, jax.random.key(0)), precision)
    batch = make_batch(config)

    def loss(part: str, values):
        return CrossLMM(config).apply({"params": quantised | {part: values}}, batch, method="loss")[0]

    for part, name in (("encoder", "patch_bias"), ("projector", "b1"), ("projector", "w2_scale")):
        gradient = jax.grad(lambda x, p=part, n=name: loss(p, quantised[p] | {n: x}))
        with pytest.raises(ConfigError, match="ModelConfig.visual_matmul is 'fp8' or 'int8'; it must be"):
            jax.eval_shape(gradient, quantised[part][name])
    jax.eval_shape(jax.grad(lambda x: loss("v2v", x)), quantised["v2v"])  # a frozen encoder needs no gradient


def test_parameters_stay_those_of_training(tiny_config) -> None:
    """Parameters that are initialised, stored and counted do not depend on the precision."""
    config = dataclasses.replace(tiny_config, visual_matmul="int8")
    params = init_params(config, jax.random.key(0))
    same = init_params(tiny_config, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    quantised = quantise_params(params, "int8")
    layers = quantised["encoder"]["layers"]
    assert layers["wo"].shape == (2, 48, 4, 12) and layers["wo_scale"].shape == (2, 48)
    assert layers["w1"].dtype == jnp.int8 and layers["w1_scale"].dtype == jnp.float32
    restored = layers["w1"].astype(jnp.float32) * layers["w1_scale"][..., None]
    step = layers["w1_scale"][..., None] / 2
    assert bool(
        jnp.all(jnp.abs(restored - jnp.swapaxes(same["encoder"]["layers"]["w1"], 1, 2)) <= step * 1.01)
    )
    assert quantised["decoder"] is params["decoder"]


def test_fp8_scales_are_per_matrix_in_the_encoder_and_per_channel_in_the_projector(tiny_config) -> None:
    params = init_params(tiny_config, jax.random.key(0))
    quantised = quantise_params(params, "fp8")
    layers, plain = quantised["encoder"]["layers"], params["encoder"]["layers"]
    assert {name for name in layers if name.endswith("_input_scale")} == {
        f"{name}_input_scale" for name in ("wq", "wo", "w1", "w2")
    }
    for name in ("wq", "wk", "wv", "wo", "w1", "w2"):
        assert layers[f"{name}_scale"].shape == (2,)
        restored = np.asarray(layers[name], np.float32) * np.reshape(
            layers[f"{name}_scale"], (2, *[1] * (layers[name].ndim - 1))
        )
        rank = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w1": 1, "w2": 1}[name]
        expected = np.moveaxis(np.asarray(plain[name]), range(1, 1 + rank), range(-rank, 0))
        step = np.abs(expected).max(axis=tuple(range(1, expected.ndim)), keepdims=True) / 224 * 2.0**-10
        assert np.all(np.abs(restored - expected) <= np.maximum(np.abs(expected) / 16, step))
    assert quantised["projector"]["w2_scale"].shape == (tiny_config.decoder.width,)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mesh", [{"data": 1, "tensor": 4, "context": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_on_any_mesh_equal_one_device(tiny_config, replace_config, make_batch, precision: str, mesh) -> None:
    """Weights are quantised on their devices; a sharded matrix has the scales of the whole."""
    config = replace_config(tiny_config, vision={"frame_chunk": 2}, visual_matmul=precision)
    params = init_params(config, jax.random.key(0))
    frames = make_batch(config, batch=4, frames=8).frames
    expected = encode(config, quantise_params(params, precision), frames)
    devices = make_mesh(MeshConfig(**mesh))
    model = CrossLMM(config, activation_rules(), stacked=False)
    shardings = param_shardings(logical_axes(config), params, devices)
    with jax.set_mesh(devices):
        placed = prepare_params(jax.device_put(params, shardings), config, devices)
        got = jax.jit(lambda p, f: model.apply({"params": p}, f, method="encode"))(placed, frames)
    matrix = placed["encoder"]["layers"]["1"]["w1"]
    assert matrix.dtype == DTYPES[precision]
    assert not matrix.sharding.is_fully_replicated
    # A sum in another order may round a number to the next code, which changes it by 1/16 in e4m3.
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)
        assert np.mean(np.abs(a - b)) < 2e-4


def test_axes_name_every_dimension(tiny_config) -> None:
    config = dataclasses.replace(tiny_config, visual_matmul="fp8")
    params = jax.eval_shape(lambda: quantise_params(init_params(config, jax.random.key(0)), "fp8"))
    axes = quantised_axes(config)
    ranks = jax.tree.map(lambda x: len(x.shape), params)
    assert ranks == jax.tree.map(len, axes, is_leaf=lambda node: isinstance(node, tuple))
    assert axes["encoder"]["layers"]["w2"] == ("layers", "vision_embed", "vision_mlp")


@pytest.mark.slow
@pytest.mark.parametrize("frames,rows", [(2, 2 * 16), (16, 16 * 9)])
def test_rows_of_fp8_products_are_a_multiple_of_16_on_a_gpu(
    monkeypatch, tiny_config, replace_config, frames: int, rows: int
) -> None:
    """Otherwise XLA would pad each product, and not fuse bias, GELU and residual."""
    vision = {"image_size": 24, "frame_chunk": frames}
    config = replace_config(tiny_config, vision=vision, attention="reference", visual_matmul="fp8")
    config = replace_config(config, merge={"grid": 1})
    assert config.vision.num_patches == 9
    params = quantise_params(init_params(config, jax.random.key(0)), "fp8")
    params = separate_layers(params)
    pixels = np.random.default_rng(0).integers(0, 256, (1, frames, 24, 24, 3), dtype=np.uint8)
    model = CrossLMM(config, stacked=False)

    def encode(params, pixels):
        return model.apply({"params": params}, pixels, method="encode")

    expected = jax.jit(encode)(params, pixels)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = jax.jit(lambda *x: encode(*x))
    for a, b in zip(on_gpu(params, pixels), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)
        assert np.mean(np.abs(a - b)) < 2e-4
    assert f"tensor<{rows}x{config.vision.mlp_width}xf8E4M3FN>" in on_gpu.lower(params, pixels).as_text()
