"""On a GPU: products in 8 bits against float64, their kernels, and attention to an 8-bit KV cache.

Run with
`pytest -m gpu tests/model/quantisation/test_quantise_gpu.py --gpu-report ...`; it skips elsewhere.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.model import CrossLMM, init_params, quantise_params
from crosslmm_jax.model.attention.dispatch import attention
from crosslmm_jax.model.dual_cross_attention import KeysValues, _scaled, compress
from crosslmm_jax.model.quantisation.quantise import DTYPES, linear, operand, quantise
from crosslmm_jax.parallel.compiler_options import matmul_options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

PRECISIONS = ("fp8", "int8")
# rows, inputs, outputs: the encoder's products, the projector's of pooled tokens, and odd sizes
SHAPES = ((5832, 1152, 1152), (5832, 1152, 4304), (5832, 4304, 1152), (72, 1152, 1536), (37, 100, 52))
# Norm of the error over that of the product, of independent roundings of both operands: e4m3's relative error
# is uniform in +-2^-4 at most (2.6% in the mean square); int8's of normal numbers some 1% at these sizes.
TOLERANCE = {"fp8": 0.045, "int8": 0.02}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_equal_the_float64_ones(shape: tuple[int, int, int], precision: str) -> None:
    """Rows of very different size, some of zeros."""
    rows, inputs, outputs = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, inputs)) * 10.0 ** rng.integers(-6, 7, (rows, 1))
    x[::7] = 0
    x = jnp.asarray(x, jnp.bfloat16)
    w = rng.standard_normal((inputs, outputs)).astype(np.float32)
    weight, scale = quantise(jnp.asarray(w.T), DTYPES[precision], -1)
    weights = {"w1": weight, "w1_scale": scale, "b1": jnp.zeros(outputs, jnp.bfloat16)}
    run = jax.jit(lambda x, p: linear(operand(x, p, "w1"), p, "w1", "b1"), compiler_options=matmul_options())
    got = np.asarray(run(x, weights), np.float64)
    expected = np.asarray(x, np.float64) @ w
    assert np.all(got[::7] == 0)
    live = np.any(np.asarray(x) != 0, axis=1)
    size = np.linalg.norm(expected[live], axis=1)
    error = np.linalg.norm(got[live] - expected[live], axis=1) / size
    assert np.sqrt(np.mean(error**2)) < TOLERANCE[precision]
    assert error.max() < 2 * TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_encoder_uses_8_bit_kernels_and_equals_float32(precision: str) -> None:
    """so400m's widths, two layers, two frames: tokens against float32, and the kernels of the products."""
    config = presets.crosslmm_2b()
    decoder = dataclasses.replace(config.decoder, num_layers=1, vocab_size=8, mlp_width=8)
    config = dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, num_layers=3), decoder=decoder
    )
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 384, 384, 3), dtype=np.uint8)

    def compiled(config, params):
        encode = jax.jit(
            lambda p, f: CrossLMM(config).apply({"params": p}, f, method="encode").originals,
            compiler_options=matmul_options(),
        )
        return encode.lower(params, frames).compile()

    with jax.default_matmul_precision("highest"):
        wide = dataclasses.replace(config, compute_dtype="float32")
        expected = np.asarray(compiled(wide, params)(params, frames))
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    narrow = quantise_params(narrow, precision)
    program = compiled(dataclasses.replace(config, visual_matmul=precision), narrow)
    got = np.asarray(program(narrow, frames), np.float32)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 2 * TOLERANCE[precision]
    text = program.as_text()
    if precision == "fp8":
        products = [line for line in text.splitlines() if "__cublas$lt$matmul$f8" in line]
        assert any('"epilogue":"BIAS_GELU"' in line and "= (f8e4m3fn[" in line for line in products)
        assert sum('"epilogue":"BIAS"' in line for line in products) >= 5
    else:  # cuBLAS or a fusion with Triton's product, never a product of dequantised operands
        assert any(
            "s32[" in line and ("custom-call" in line or "fusion" in line) for line in text.splitlines()
        )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["plain", "blockwise", "cudnn", "auto"])
@pytest.mark.parametrize("queries", [1, 33, 180])
def test_attention_to_an_8_bit_cache(queries: int, backend: str, precision: str) -> None:
    """Against float32 attention to the dequantised cache, so that only rounding to bfloat16 differs."""
    rng = np.random.default_rng(queries)
    frames, patches, heads, kv_heads, size = 21, 729, 6, 2, 128

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(jnp.bfloat16)

    q = normal(2, queries, heads, size)
    shape = (2, frames, patches, kv_heads, size)
    kv = jax.jit(lambda k, v: compress(KeysValues(k, v), precision))(normal(*shape) + 5, normal(*shape))
    stop = jnp.asarray(rng.integers(0, frames * patches, (2, queries)), jnp.int32)

    def attend(q: jax.Array, kv: KeysValues, chosen: str) -> jax.Array:
        k, v = (x.reshape(2, -1, kv_heads, size) for x in (kv.keys, kv.values))
        out = attention(_scaled(q, kv.key_scale), k, v, kv_stop=stop, backend=chosen)
        return _scaled(out, kv.value_scale)

    run = jax.jit(attend, static_argnums=2)
    got = np.asarray(run(q, kv, backend), np.float32)
    expected = np.asarray(run(q.astype(jnp.float32), kv, "reference"))
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) < 1e-2
