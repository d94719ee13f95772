"""The loss on its own: layouts of the head that do not divide, and the precision of its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.model.loss import HeadLayout, next_token_loss, next_token_scores
from crosslmm_jax.parallel import activation_rules, make_mesh
from crosslmm_jax.parallel.mesh import MESH_AXES


def random_inputs(batch: int, length: int, width: int, vocabulary: int, dtype=np.float32):
    """Hidden states, a head, tokens, and weights of which most are 0; the second row has no target."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), dtype)
    head = jnp.asarray(rng.normal(size=(width, vocabulary)), np.float32)
    tokens = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)
    weights = ((rng.random((batch, length)) < 0.4) * rng.random((batch, length))).astype(np.float32)
    weights[1] = 0
    return hidden, head, tokens, weights


def expected(hidden, head, tokens, weights):
    """Loss, hits, and gradients by hidden states and head, in float64."""
    hidden, head = (np.asarray(x, np.float64) for x in (hidden, head))
    logits, weights = hidden[:, :-1] @ head, weights[:, 1:].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    target = np.eye(head.shape[1])[tokens[:, 1:]]
    loss = -(weights * np.log((p * target).sum(-1))).sum()
    gradient = weights[..., None] * (p - target)
    by_hidden = np.pad(gradient @ head.T, ((0, 0), (0, 1), (0, 0)))
    hits = (weights * (logits.argmax(-1) == tokens[:, 1:])).sum()
    return loss, hits, by_hidden, np.einsum("btd,btv->dv", hidden[:, :-1], gradient)


@pytest.mark.parametrize(
    ("mesh", "batch", "head", "lies"),
    [
        ((1, 8, 1, 1), 8, (18, 48), (None, ("tensor", "fsdp"))),  # 8 devices divide V but not D
        ((1, 2, 2, 2), 3, (16, 31), (("fsdp", "tensor"), None)),  # 3 rows; 31 entries on 2 devices
        ((2, 2, 2, 1), 2, (15, 35), (None, None)),  # nothing divides
        ((1, 2, 1, 4), 4, (16, 32), ("fsdp", "tensor")),  # 4 devices share out the targets of 2 rows
    ],
)
def test_head_and_rows_that_do_not_divide(monkeypatch, mesh, batch, head, lies) -> None:
    monkeypatch.setattr("crosslmm_jax.model.loss.LOGITS_AT_ONCE", 6)
    inputs = random_inputs(batch, 13, *head)
    loss, hits, *gradients = expected(*inputs)
    rules = activation_rules()
    with jax.set_mesh(make_mesh(MeshConfig(**dict(zip(MESH_AXES, mesh, strict=True))))):
        assert HeadLayout.of(rules, batch, head).head == jax.P(*lies)
        by_both = jax.value_and_grad(next_token_loss, (0, 1), has_aux=True)
        (found, weight), found_gradients = jax.jit(lambda *x: by_both(*x, rules))(*inputs)
        scores = jax.jit(lambda *x: next_token_scores(*x, rules))(*inputs)
    assert found == pytest.approx(loss, rel=1e-6)
    assert weight == pytest.approx(inputs[3][:, 1:].sum(), rel=1e-6)
    np.testing.assert_allclose(scores, (found, hits, weight), rtol=1e-6)
    for x, y in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_no_target_at_all() -> None:
    inputs = random_inputs(2, 5, 8, 16)
    hidden, head, tokens, weights = inputs
    by_both = jax.value_and_grad(next_token_loss, (0, 1), has_aux=True)
    (loss, weight), gradients = jax.jit(by_both)(hidden, head, tokens, np.zeros_like(weights))
    assert loss == weight == 0
    assert not any(np.any(gradient) for gradient in gradients)


def test_a_frozen_head_has_no_gradient() -> None:
    """Not even one that is computed and then dropped."""
    inputs = random_inputs(2, 5, 8, 16)
    hidden, head, *rest = inputs
    frozen = jax.make_jaxpr(jax.grad(lambda x: next_token_loss(x, head, *rest)[0]))(hidden)
    both = jax.make_jaxpr(jax.grad(lambda x, w: next_token_loss(x, w, *rest)[0], (0, 1)))(hidden, head)
    assert [str(jaxpr).count("dot_general") for jaxpr in (frozen, both)] == [2, 3]


def test_gradient_of_the_head_over_256_chunks_is_summed_in_float32(monkeypatch) -> None:
    """From hidden states in bfloat16: carried in bfloat16 from chunk to chunk, it would be off by 2%."""
    monkeypatch.setattr("crosslmm_jax.model.loss.LOGITS_AT_ONCE", 8)
    hidden, head, tokens, _ = random_inputs(2, 1025, 16, 64, jnp.bfloat16)
    head = head.astype(jnp.bfloat16).astype(np.float32)
    weights = np.ones((2, 1025), np.float32)
    gradient = jax.jit(jax.grad(lambda w: next_token_loss(hidden, w, tokens, weights)[0]))(head)
    wanted = expected(hidden, head, tokens, weights)[3]
    assert gradient.dtype == np.float32
    assert np.linalg.norm(gradient - wanted) < 1e-3 * np.linalg.norm(wanted)
    assert np.abs(gradient - wanted).max() < 1e-3 * np.abs(wanted).max()
