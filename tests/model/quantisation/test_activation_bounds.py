"""Bounds of the inputs of an encoder layer's matrices, by `activation_bounds`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax import presets
from crosslmm_jax.model import encoder as siglip
from crosslmm_jax.model import quantise_params
from crosslmm_jax.model.quantisation.activation_bounds import activation_bounds
from crosslmm_jax.model.quantisation.quantise import operand

CONFIG = dataclasses.replace(presets.tiny().vision, num_layers=2)
WIDTH = CONFIG.width


def random_layer(rng: np.random.Generator, spread: float) -> dict[str, np.ndarray]:
    """Weights of one layer; channels of norms and outputs of matrices differ by up to e^(2 `spread`)."""
    table = siglip.encoder_weights(CONFIG, stacked=False)["layers"]["0"]
    layer = {}
    for name, (shape, _, _) in table.items():
        sizes = np.exp(spread * rng.uniform(-1, 1, shape[-1])) * (0.15 if name.startswith("w") else 1)
        layer[name] = (rng.standard_normal(shape) * sizes).astype(np.float32)
    return layer


def largest_inputs(layer: dict[str, np.ndarray], x: np.ndarray, dtype: str) -> dict[str, float]:
    """Largest magnitude of the input of each matrix in a layer with fp8 products."""
    stacked = {"encoder": {"layers": {name: jnp.asarray(value)[None] for name, value in layer.items()}}}
    quantised = quantise_params(stacked, "fp8")["encoder"]["layers"]
    weights = {name: value[0] for name, value in quantised.items()}
    most = {}

    def recording(x, weights, matrix):
        most[matrix] = float(jnp.max(jnp.abs(x)))
        return operand(x, weights, matrix)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(siglip, "operand", recording)
        weights = {name: w.astype(dtype) if name.startswith("b") else w for name, w in weights.items()}
        out = siglip.encoder_layer(
            weights, jnp.asarray(x, dtype), patches=x.shape[1], config=CONFIG, backend="reference"
        )
    assert bool(jnp.all(jnp.isfinite(out)))
    return most


def hardest(layer: dict[str, np.ndarray], norm: str, matrix: str) -> np.ndarray:
    """Rows that, once normalised, point along the columns of a matrix, which maximises its products."""
    columns = layer[f"{norm}_scale"][:, None] * layer[matrix].reshape(WIDTH, -1)
    return np.concatenate([columns.T, -columns.T])


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 3), st.sampled_from(["float32", "bfloat16"]))
def test_no_input_exceeds_its_bound(seed: int, spread: float, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    layer = random_layer(rng, spread)
    rows = [rng.standard_normal((20, WIDTH)), np.eye(WIDTH) * 1e3, -np.eye(WIDTH), np.ones((1, WIDTH))]
    # Rows along the columns of wv and w1; the residual stream that the MLP reads can be anything.
    rows += [hardest(layer, "norm1", "wv") * 100, hardest(layer, "norm2", "w1") * 1e4]
    bounds = activation_bounds({name: jnp.asarray(value) for name, value in layer.items()})._asdict()
    # One patch per frame: its attention weight is one, so that values are not averaged. Rows share only the
    # scales that follow from the weights.
    read = largest_inputs(layer, np.concatenate(rows).astype(np.float32)[:, None], dtype)
    assert set(read) == set(bounds)
    for matrix, most in read.items():
        assert most <= float(bounds[matrix]), matrix


@pytest.mark.slow
def test_the_bounds_are_reached() -> None:
    """Up to the margin for rounding: a looser bound would waste the range of e4m3."""
    layer = random_layer(np.random.default_rng(0), 0.5)
    layer |= {name: np.zeros_like(value) for name, value in layer.items() if name in ("norm1_bias", "bv")}
    bounds = activation_bounds({name: jnp.asarray(value) for name, value in layer.items()})
    spike = largest_inputs(layer, np.eye(WIDTH, dtype=np.float32)[:, None], "float32")
    aligned = largest_inputs(
        layer, hardest(layer, "norm1", "wv").astype(np.float32)[:, None] * 100, "float32"
    )
    assert spike["wq"] > 0.8 * float(bounds.wq)
    assert aligned["wo"] > 0.7 * float(bounds.wo)


def layer_of_zeros(**weights: Any) -> dict[str, np.ndarray]:
    """Weights of a layer: zeros except those given, each as a number or an array of its shape."""
    layer = random_layer(np.random.default_rng(0), 0)
    return {name: np.full_like(value, weights.get(name, 0)) for name, value in layer.items()}


@pytest.mark.parametrize(
    ("weights", "matrix"),
    [
        ({"norm1_scale": 0.1, "norm1_bias": 9}, "wq"),
        ({"bv": 9}, "wo"),
        ({"norm2_scale": 0.1, "norm2_bias": -9}, "w1"),
        ({"b1": 9}, "w2"),
    ],
)
def test_biases_are_in_the_bounds(weights: dict[str, float], matrix: str) -> None:
    """Each alone, with small other weights."""
    layer = layer_of_zeros(**weights)
    bounds = activation_bounds({name: jnp.asarray(value) for name, value in layer.items()})._asdict()
    read = largest_inputs(layer, np.eye(WIDTH, dtype=np.float32)[:, None], "float32")
    assert 8.9 < read[matrix] <= float(bounds[matrix]) < 12


@pytest.mark.slow
def test_rounding_is_in_the_bounds() -> None:
    """Every product of a sum has two operands that e4m3 rounds up by the most, to 9/8."""
    signs = np.resize([1.0, -1.0], WIDTH).astype(np.float32)
    wv = np.zeros((WIDTH, CONFIG.num_heads, CONFIG.head_dim), np.float32)
    wv[:, 0, 0] = 1.0626 * signs
    layer = layer_of_zeros(norm1_scale=1.0626, wv=wv)
    bound = float(activation_bounds({name: jnp.asarray(value) for name, value in layer.items()}).wo)
    read = largest_inputs(layer, signs[None, None], "float32")["wo"]
    assert WIDTH * 1.125**2 == pytest.approx(read, rel=1e-4)
    assert 0.95 * bound < read <= bound


def test_inputs_beyond_a_bound_are_clipped() -> None:
    """For numbers that nearly equal their mean, the output of a one-pass LayerNorm exceeds its bound."""
    layer = layer_of_zeros(norm1_scale=1)
    token = np.full((1, 1, WIDTH), 1000, np.float32)
    token[..., 0] = 1001
    bounds = activation_bounds({name: jnp.asarray(value) for name, value in layer.items()})
    assert largest_inputs(layer, token, "float32")["wq"] > 10 * float(bounds.wq)  # and all is finite


@pytest.mark.slow
def test_a_layer_of_zeros() -> None:
    layer = layer_of_zeros()
    assert set(largest_inputs(layer, np.ones((2, 3, WIDTH), np.float32), "float32").values()) == {0.0}
