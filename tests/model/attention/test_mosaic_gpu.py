"""On a Hopper GPU: the encoder's attention kernel against the float32 definition, forward and gradients."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.model import init_params
from crosslmm_jax.model.attention import mosaic
from crosslmm_jax.model.attention.dispatch import attention, reference_attention
from crosslmm_jax.model.encoder import SiglipEncoder
from crosslmm_jax.parallel import activation_rules, make_mesh
from crosslmm_jax.parallel.compiler_options import matmul_options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        getattr(jax.local_devices()[0], "compute_capability", None) != mosaic.HOPPER,
        reason="needs a Hopper GPU",
    ),
]

TOLERANCE = 1e-2  # norm of the difference over that of the reference
# batch, queries, keys, heads, head size, keys that are read
SHAPES = [
    (3, 730, 730, 2, 72, 729),  # SigLIP2's, with a patch of padding
    (2, 729, 729, 3, 72, 729),
    (1, 64, 64, 1, 72, 64),  # one warpgroup's queries, half a block of keys
    (2, 193, 300, 3, 80, 129),  # one query and one key more than whole blocks
    (1, 100, 1000, 2, 72, 1),
    (2, 576, 576, 4, 80, 512),
    (150, 70, 145, 16, 72, 145),  # several items for every multiprocessor
]


def relative_error(got: Any, wanted: Any) -> float:
    got, wanted = (np.asarray(x, np.float32) for x in (got, wanted))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def draw(shape: tuple[int, ...], dtype: str) -> tuple[list[Any], np.ndarray]:
    batch, queries, keys, heads, size, read = shape
    rng = np.random.default_rng(shape)
    arrays = [
        rng.standard_normal((batch, n, heads, size), np.float32) * std
        for n, std in ((queries, 2.0), (keys, 2.0), (keys, 1.0), (queries, 1.0))
    ]
    # Later keys weigh more, so that running maxima change. Keys beyond `read` must not be read.
    arrays[1] *= np.linspace(0.5, 2, keys, dtype=np.float32)[:, None, None]
    arrays[1][:, read:], arrays[2][:, read:] = 30, 1e4
    return [jnp.asarray(x, dtype) for x in arrays], np.full((batch, 1), read, np.int32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_forward_and_backward(
    record_property: Any, shape: tuple[int, ...], dtype: str
) -> None:
    (q, k, v, d_out), stop = draw(shape, dtype)
    attend = functools.partial(attention, kv_stop=stop, backend="mosaic")
    got = [jax.jit(attend)(q, k, v), *jax.jit(lambda *x: jax.vjp(attend, *x[:3])[1](x[3]))(q, k, v, d_out)]

    def reference(q: Any, k: Any, v: Any) -> Any:
        stops = jnp.broadcast_to(jnp.asarray(stop), q.shape[:2])
        return reference_attention(q, k, v, jnp.zeros_like(stops), stops)

    def both(q: Any, k: Any, v: Any, d_out: Any) -> list[Any]:
        out, backward = jax.vjp(reference, q, k, v)
        return [out, *backward(d_out)]

    wide = (x.astype(jnp.float32) for x in (q, k, v, d_out))
    wanted = jax.jit(both, compiler_options=matmul_options())(*wide)
    # With one key its weight is 1: gradients of queries and keys are 0, and cuDNN's are rounding errors.
    errors = [relative_error(mine, other) for mine, other in zip(got, wanted, strict=True) if np.any(other)]
    record_property("errors", errors)
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 5])
def test_the_encoder_takes_it_and_equals_float32(record_property: Any, caplog: Any, frames: int) -> None:
    """Three layers of SigLIP2's sizes, with and without a mesh of one device."""
    vision = dataclasses.replace(presets.crosslmm_2b().vision, num_layers=4)
    config = dataclasses.replace(presets.crosslmm_2b(), vision=vision)
    params = {"params": init_params(config, jax.random.key(0))["encoder"]}
    images = np.random.default_rng(0).integers(0, 256, (frames, vision.image_size, vision.image_size, 3))
    images = images.astype(np.uint8)

    def encode(dtype: str, backend: Any, rules: Any = None) -> Any:
        apply = jax.jit(SiglipEncoder(vision, dtype, backend, rules).apply, compiler_options=matmul_options())
        return np.asarray(apply(params, images), np.float32)

    expected = encode("float32", "blockwise")
    with caplog.at_level(logging.DEBUG, logger="crosslmm_jax.model.attention.dispatch"):
        ours = encode("bfloat16", "auto")
        with jax.set_mesh(make_mesh(MeshConfig(), devices=jax.devices()[:1])):
            with_mesh = encode("bfloat16", "auto", activation_rules())
    assert caplog.text.count("mosaic") == 2
    errors = {
        "mosaic": relative_error(ours, expected),
        "cudnn": relative_error(encode("bfloat16", "cudnn"), expected),
    }
    record_property("errors", errors)
    assert relative_error(with_mesh, ours) < TOLERANCE
    # The other operations are in bfloat16 too, so the error need only be no larger than with cuDNN.
    assert errors["mosaic"] < 1.05 * errors["cudnn"]
