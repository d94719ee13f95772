"""The model on eight simulated devices against one."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.model import CrossLMM, init_params, logical_axes
from crosslmm_jax.parallel.axis_rules import activation_rules
from crosslmm_jax.parallel.mesh import make_mesh
from crosslmm_jax.parallel.sharding import param_shardings

COLLECTIVE = r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def loss(params, batch, model):
    return model.apply({"params": params}, batch, method="loss")[0]


@pytest.fixture(scope="module")
def chunks_of_two() -> ModelConfig:
    tiny = presets.tiny()
    return dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, frame_chunk=2))


@pytest.fixture(scope="module")
def on_one_device(chunks_of_two, make_batch):
    """Parameters, a batch whose rows with padded frames leave whole devices idle, its loss and gradients."""
    params = init_params(chunks_of_two, jax.random.key(0))
    batch = make_batch(chunks_of_two, batch=8, frames=8, text=8, valid_frames=(8, 1, 5, 8, 2, 3, 8, 4))
    step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    return params, batch, *step(params, batch, CrossLMM(chunks_of_two))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 1, "context": 8},
        {"data": 2, "context": 2, "tensor": 2},
        {"data": 1, "fsdp": 2, "context": 4},
        {"data": 1, "tensor": 8},
    ],
    ids=str,
)
def test_loss_and_gradients_on_any_mesh_equal_one_device(chunks_of_two, on_one_device, mesh):
    """Frames over `context` are merged by log-sum-exp."""
    params, batch, value, gradients = on_one_device
    devices = make_mesh(MeshConfig(**mesh))
    shardings = param_shardings(logical_axes(chunks_of_two), params, devices)
    model = CrossLMM(chunks_of_two, activation_rules())
    with jax.set_mesh(devices):
        step = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, model)))
        placed = jax.device_put(params, shardings)
        other, other_gradients = step(placed, batch)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradients, other_gradients
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "context": 2}], ids=str)
def test_the_encoder_gathers_weights_and_leaves_frames_where_they_are(tiny_config, make_batch, mesh):
    """No collective of the encoder, forward or backward, moves the activations of all frames."""
    batch = make_batch(tiny_config, batch=8, frames=16)
    devices = make_mesh(MeshConfig(**mesh))
    params = jax.eval_shape(lambda: init_params(tiny_config, jax.random.key(0)))
    shardings = param_shardings(logical_axes(tiny_config), params, devices)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    model = CrossLMM(tiny_config, activation_rules())
    with jax.set_mesh(devices):
        step = jax.jit(jax.grad(lambda params, batch: loss(params, batch, model)))
        text = step.lower(shapes, batch).compile().as_text()
    moved = {
        math.prod(map(int, dims.split(",")))
        for line in text.splitlines()
        if "encoder/" in line and (found := re.search(COLLECTIVE, line))
        for dims in re.findall(r"\[([\d,]+)\]", found[1])
    }
    vision = tiny_config.vision
    activations = batch.frame_times.size * vision.num_patches * vision.width
    assert moved and max(moved) < activations, (sorted(moved), activations)
