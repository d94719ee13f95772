"""Memory of the encoder: rematerialisation, and how many frames are encoded at once."""

import dataclasses
import re
import sys
from collections.abc import Iterator

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crosslmm_jax import presets
from crosslmm_jax.model import CrossLMM, init_params
from crosslmm_jax.model import encode_frames as vision

REMATS = ("none", "elementwise", "layer", "chunk")  # from most memory to least
FRAMES = 16


def encoder_of(remat, backend, dtype="float32"):
    """An encoder of eight layers, for four chunks."""
    tiny = presets.tiny()
    tower = dataclasses.replace(
        tiny.vision, image_size=64, width=64, num_layers=9, mlp_width=256, frame_chunk=4, remat=remat
    )
    return dataclasses.replace(tiny, vision=tower, attention=backend, compute_dtype=dtype)


def gradient_of(config):
    model = CrossLMM(config)

    def loss(encoder, params, frames):
        visual = model.apply({"params": params | {"encoder": encoder}}, frames, method="encode")
        compact, originals = (jnp.sum(jnp.cos(x.astype(jnp.float32))) for x in visual)
        return compact + originals / 64

    params = init_params(config, jax.random.key(0))
    size = config.vision.image_size
    frames = np.random.default_rng(0).integers(0, 256, (1, FRAMES, size, size, 3), dtype=np.uint8)
    return jax.grad(loss), (params["encoder"], params, frames)


def products(jaxpr) -> Iterator[str]:
    """Every matrix product of a program, those of loop bodies once."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield str(equation.outvars[0].aval)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend,dtype,tolerance", [("reference", "float32", 1e-5), ("cudnn", "bfloat16", 0.03)]
)
def test_an_odd_number_of_patches_is_padded_once_for_training_on_a_gpu(
    monkeypatch, backend, dtype, tolerance
):
    """cuDNN's backward pass takes only even lengths. No patch reads padding, and it gets no gradient."""
    monkeypatch.setattr(
        sys.modules["crosslmm_jax.model.attention.cudnn"], "IMPLEMENTATION", "xla"
    )  # in place of cuDNN
    config = encoder_of("elementwise", backend, dtype)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=56))
    assert config.vision.num_patches == 49
    gradient, arguments = gradient_of(config)
    expected = jax.jit(gradient)(*arguments)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = jax.jit(gradient_of(config)[0])
    got = on_gpu(*arguments)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        if path[-1].key != "bk":  # shifts all scores of a query equally: its gradient is rounding error
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-6, path
    padded = set(
        re.findall(r"call @_pad\w*\(.*\) : \(tensor<([\dx]+)x[a-z]", on_gpu.lower(*arguments).as_text())
    )
    assert "4x49x64" in padded and "4x49x4x16" not in padded, "tokens, not queries, keys and values by head"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["blockwise", "cudnn"])
def test_gradients_are_equal_and_memory_decreases(backend, monkeypatch) -> None:
    monkeypatch.setattr(
        sys.modules["crosslmm_jax.model.attention.cudnn"], "IMPLEMENTATION", "xla"
    )  # in place of cuDNN
    dtype = "bfloat16" if backend == "cudnn" else "float32"
    gradients, temporaries, counts = {}, {}, {}
    for remat in REMATS:
        gradient, arguments = gradient_of(encoder_of(remat, backend, dtype))
        traced = jax.jit(gradient).trace(*arguments)
        counts[remat] = len(list(products(traced.jaxpr.jaxpr)))
        compiled = traced.lower().compile()
        gradients[remat] = compiled(*arguments)
        temporaries[remat] = compiled.memory_analysis().temp_size_in_bytes
    sizes = [temporaries[remat] for remat in REMATS]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes), temporaries
    assert counts["none"] == counts["elementwise"] < counts["layer"], counts
    tolerance = 1e-6 if dtype == "float32" else 1e-2  # programs round to bfloat16 in other places
    for remat in REMATS[1:]:
        difference = jax.tree.map(jnp.subtract, gradients[remat], gradients["none"])
        assert optax.tree.norm(difference) <= tolerance * optax.tree.norm(gradients["none"])


class Device:
    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit, "bytes_in_use": 10**9}


@pytest.mark.parametrize(
    ("preset", "gigabytes", "chunk"),
    [
        ("crosslmm_2b", 80, 32), ("crosslmm_2b", 141, 32), ("crosslmm_2b", 8, 16), ("crosslmm_2b", 5, 4),
        ("crosslmm_7b", 16, 1), ("crosslmm_7b", 24, 32), ("crosslmm_2b", None, 8), ("crosslmm_7b", 4, 1),
    ],
)  # fmt: skip
def test_chunks_fit_the_memory_of_a_device(preset, gigabytes, chunk, monkeypatch) -> None:
    config = presets.get_preset(preset)
    limit = None if gigabytes is None else gigabytes * 10**9
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(limit)])
    assert vision.frame_chunk(config) == chunk
    configured = dataclasses.replace(config, vision=dataclasses.replace(config.vision, frame_chunk=5))
    assert vision.frame_chunk(configured) == 5


def test_estimated_bytes_of_weights() -> None:
    """Within 2% of the true size; biases and norms are not counted."""
    config = presets.crosslmm_2b()
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    held = 2 * sum(x.size for x in jax.tree.leaves(abstract))
    assert vision._weight_bytes(config) == pytest.approx(held, rel=0.02)
