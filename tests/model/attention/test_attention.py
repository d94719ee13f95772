"""Every attention backend against the definition, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax.model.attention import cudnn
from crosslmm_jax.model.attention.blockwise import MASKED, BlockSizes, blockwise_attention
from crosslmm_jax.model.attention.dispatch import attention, reference_attention


def draw(seed: int, *, batch: int, length: int, keys: int, heads: int, groups: int, size: int = 8):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, length, heads * groups, size)).astype(np.float32)
    k, v = (rng.standard_normal((batch, keys, heads, size)).astype(np.float32) for _ in range(2))
    stop = rng.integers(0, keys + 1, (batch, length)).astype(np.int32)
    start = rng.integers(0, keys + 1, (batch, length)).astype(np.int32)
    return q, k, v, np.minimum(start, stop) * (rng.random((batch, length)) < 0.5).astype(np.int32), stop


# (batch, length, keys, heads, groups, blocks). Few compiled shapes, so that there can be many examples.
SHAPES = [
    (2, 7, 23, 2, 1, BlockSizes(3, 5)),
    (1, 9, 16, 1, 3, BlockSizes(4, 16)),
    (2, 1, 21, 2, 2, BlockSizes(8, 4)),
]


@functools.cache
def value_and_gradients(shape: int, ours: bool):
    blocks = SHAPES[shape][-1]

    def loss(q, k, v, start, stop, weights):
        if ours:
            out = blockwise_attention(q, k, v, start, stop, q.shape[-1] ** -0.5, blocks)[0]
        else:
            out = reference_attention(q, k, v, start, stop)
        return jnp.sum(weights * out), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.integers(0, len(SHAPES) - 1))
def test_blockwise_equals_reference_forward_and_backward(seed, shape):
    batch, length, keys, heads, groups, _ = SHAPES[shape]
    arrays = draw(seed, batch=batch, length=length, keys=keys, heads=heads, groups=groups)
    weights = np.random.default_rng(seed + 1).standard_normal(arrays[0].shape).astype(np.float32)
    (_, ours), our_gradients = value_and_gradients(shape, True)(*arrays, weights)
    (_, expected), gradients = value_and_gradients(shape, False)(*arrays, weights)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    for mine, other in zip(our_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


@pytest.mark.slow
def test_log_sum_exp_and_its_gradient():
    q, k, v, start, stop = draw(3, batch=2, length=5, keys=17, heads=2, groups=2)
    stop = np.maximum(stop, start + 1)

    def blockwise(q, k):
        out, lse = blockwise_attention(q, k, v, start, stop, 1.0, BlockSizes(2, 4))
        return jnp.sum(jnp.sin(lse)) + jnp.sum(out**2)

    def plain(q, k):
        grouped = q.reshape(2, 5, 2, 2, 8)
        scores = jnp.einsum("btkgh,bskh->btkgs", grouped, k)
        positions = jnp.arange(17)
        visible = (positions >= start[..., None]) & (positions < stop[..., None])
        scores = jnp.where(visible[:, :, None, None], scores, MASKED)
        out = jnp.einsum("btkgs,bskh->btkgh", jax.nn.softmax(scores), v)
        return jnp.sum(jnp.sin(jax.nn.logsumexp(scores, axis=-1))) + jnp.sum(out**2)

    (ours, ours_grads), (theirs, their_grads) = jax.jit(
        lambda *arrays: [jax.value_and_grad(f, (0, 1))(*arrays) for f in (blockwise, plain)]
    )(q, k)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for mine, other in zip(ours_grads, their_grads, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "plain"])
def test_against_torch(backend):
    q, k, v, _, _ = draw(5, batch=2, length=7, keys=7, heads=2, groups=3)
    t = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    tq, tk, tv = (x.transpose(1, 2) for x in t)
    theirs = torch.nn.functional.scaled_dot_product_attention(tq, tk, tv, is_causal=True, enable_gqa=True)

    def loss(*arrays):
        out = attention(*arrays, causal=True, backend=backend)
        return jnp.sum(out**2), out

    grads, ours = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).detach(), atol=1e-5)
    theirs.square().sum().backward()
    for mine, other in zip(grads, t, strict=True):
        assert other.grad is not None
        np.testing.assert_allclose(mine, other.grad, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blockwise", "plain"])
def test_a_query_that_reads_no_key_gets_exactly_zero(backend):
    q, k, v, _, stop = draw(7, batch=2, length=6, keys=9, heads=1, groups=2)
    stop[:, ::2] = 0

    def total(q, k, v, stop):
        out = attention(q, k, v, kv_stop=stop, backend=backend)
        return jnp.sum(out), out

    graded = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    out = np.asarray(graded(q, k, v, stop)[1])
    assert np.all(out[:, ::2] == 0)
    assert np.all(np.any(out[stop > 0] != 0, axis=(-1, -2)))
    assert all(np.all(np.asarray(g) == 0) for g in graded(q, k, v, stop * 0)[0])


def temporary_bytes(keys: int, *, backward: bool) -> int:
    """Temporary memory of the compiled program, in bytes."""

    def loss(q, k, v, stop):
        return jnp.sum(attention(q, k, v, kv_stop=stop, backend="blockwise"))

    function = jax.grad(loss, argnums=(0, 1, 2)) if backward else loss
    q = jax.ShapeDtypeStruct((1, 64, 4, 16), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, keys, 2, 16), jnp.float32)
    stop = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    return jax.jit(function).lower(q, kv, kv, stop).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_blockwise_memory_does_not_grow_with_keys(backward):
    short, long = (
        temporary_bytes(8 * 1024, backward=backward),
        temporary_bytes(64 * 1024 + 5, backward=backward),
    )
    scores = 4 * 64 * 4 * 64 * 1024
    assert long < scores / 4
    # The gradients of k and v themselves may be double-buffered by the CPU compiler, scores never.
    kv_bytes = 4 * 2 * 2 * 16 * (64 * 1024 + 5) if backward else 0
    assert long - short <= kv_bytes + 4096


def test_errors_of_wrong_calls():
    q, k, v, _, stop = draw(1, batch=1, length=4, keys=6, heads=1, groups=1)
    with pytest.raises(ValueError, match="causal"):
        attention(q, k, v, causal=True)
    with pytest.raises(ValueError, match="cudnn"):
        attention(q, k, v, kv_stop=stop, backend="cudnn")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "keys", "causal", "limited"),
    [
        (27, 27, False, False), (27, 27, False, True), (33, 33, True, False),
        (9, 41, False, False), (9, 41, False, True),
    ],
)  # fmt: skip
def test_odd_lengths_are_padded_only_for_gradients(monkeypatch, queries, keys, causal, limited):
    """cuDNN's backward pass takes only even lengths. XLA's attention stands in for it in this test."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    rng = np.random.default_rng(keys)
    q, k, v = (rng.standard_normal((2, n, 2, 8), np.float32) for n in (queries, keys, keys))
    stop = np.repeat([[keys], [keys - 4]], queries, axis=1) if limited else None

    def loss(q, k, v, backend, dtype):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        out = attention(q, k, v, causal=causal, kv_stop=stop, backend=backend).astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    def run(backend, dtype):
        graded = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True), static_argnums=(3, 4))
        (_, out), grads = graded(q, k, v, backend, dtype)
        return [out, *grads]

    for got, expected in zip(run("cudnn", jnp.bfloat16), run("reference", jnp.float32), strict=True):
        error = np.linalg.norm(np.asarray(got - expected)) / np.linalg.norm(np.asarray(expected))
        assert error < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("backend", ["reference", "blockwise", "plain", "cudnn"])
@pytest.mark.parametrize("lengths", [(17, 4), (17, 0)])
def test_one_length_for_all_queries_of_a_row(monkeypatch, backend, lengths, known):
    """A `kv_stop` of [B, 1] is the same for all queries, so cuDNN needs no branch on the device."""
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    dtype = jnp.bfloat16 if backend == "cudnn" else jnp.float32
    q, k, v = (jnp.asarray(x, dtype) for x in draw(3, batch=2, length=6, keys=17, heads=2, groups=2)[:3])
    stop = np.array(lengths, np.int32)[:, None]

    def loss(q, k, v, stop, backend):
        return jnp.sum(jnp.sin(attention(q, k, v, kv_stop=stop, backend=backend).astype(jnp.float32)))

    graded = jax.value_and_grad(loss, (0, 1, 2))
    expected = graded(*(x.astype(jnp.float32) for x in (q, k, v)), np.repeat(stop, 6, axis=1), "reference")
    got = graded(q, k, v, stop if known else jnp.asarray(stop), backend)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a.astype(jnp.float32) - b) <= 0.02 * np.linalg.norm(b) + 1e-6
    program = str(jax.make_jaxpr(functools.partial(loss, backend=backend))(q, k, v, stop))
    assert "cond[" not in program


@pytest.mark.parametrize("keys", [2560, 255 * 729, 256 * 729, 2048 * 729])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_decoding_on_accelerators_uses_plain_products_or_split_k(monkeypatch, caplog, platform, keys):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(cudnn, "cudnn_attention", lambda q, *_, **__: q)
    q = jax.ShapeDtypeStruct((1, 1, 28, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, keys, 4, 128), jnp.bfloat16)
    stop = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with caplog.at_level("DEBUG", "crosslmm_jax.model.attention.dispatch"):
        jax.eval_shape(lambda q, k, stop: attention(q, k, k, kv_stop=stop), q, k, stop)
    by_size = "blockwise" if keys > 2**18 else "reference"
    chosen = {"cpu": by_size, "tpu": "plain", "gpu": "plain" if keys == 2560 or keys % 2 else "cudnn"}[
        platform
    ]
    assert caplog.messages[-1].endswith(f": {chosen}")
