"""The model on eight simulated devices against one."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from crosslmm_jax.config import MeshConfig, ModelConfig
from crosslmm_jax.model import CrossLMM, apply, init_params, logical_axes
from crosslmm_jax.parallel.axis_rules import activation_rules
from crosslmm_jax.parallel.mesh import MESH_AXES, make_mesh
from crosslmm_jax.parallel.sharding import param_shardings, to_global

COLLECTIVE = r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def loss(params, batch, model):
    return model.apply({"params": params}, batch, method="loss")[0]


# Text lengths and videos (a tuple with the number of frames): uneven videos, rows with two, one without.
ROWS = [
    [3, (2,), 4, (3,), 5], [(8,), 6], [7], [2, (1,), 3], [(5,), 4], [4, (8,), 3], [(2,), 2, (4,), 2],
    [1, (3,), 9],
]  # fmt: skip


@pytest.fixture(scope="module")
def chunks_of_two(micro_config) -> ModelConfig:
    return dataclasses.replace(micro_config, vision=dataclasses.replace(micro_config.vision, frame_chunk=2))


def mean_loss(params, batch, model):
    total, weight = apply(model, params, CrossLMM.loss, batch)
    return total / weight


@pytest.fixture(scope="module")
def on_one_device(chunks_of_two, interleaved_batch):
    """Parameters, a batch, its loss and all gradients."""
    params = init_params(chunks_of_two, jax.random.key(0))
    batch = interleaved_batch(chunks_of_two, ROWS, frames=8, text=15)
    step = jax.jit(jax.value_and_grad(mean_loss), static_argnums=2)
    return params, batch, *step(params, batch, CrossLMM(chunks_of_two))


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 1, 4), (1, 1, 1, 8), (1, 2, 2, 2)],
    ids=str,
)
def test_loss_and_gradients_on_any_mesh_equal_one_device(chunks_of_two, on_one_device, mesh, monkeypatch):
    monkeypatch.setattr("crosslmm_jax.model.loss.LOGITS_AT_ONCE", 5)
    params, batch, value, gradients = on_one_device
    devices = make_mesh(MeshConfig(**dict(zip(MESH_AXES, mesh, strict=True))))
    shardings = param_shardings(logical_axes(chunks_of_two), params, devices)
    model = CrossLMM(chunks_of_two, activation_rules())
    with jax.set_mesh(devices):
        step = jax.jit(jax.value_and_grad(lambda p, b: mean_loss(p, b, model)))
        other, other_gradients = step(jax.device_put(params, shardings), to_global(batch, devices))
    np.testing.assert_allclose(other, value, atol=1e-5, rtol=0)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(other_gradients), jax.tree.leaves(gradients), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


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
