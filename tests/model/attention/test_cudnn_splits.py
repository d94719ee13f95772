"""Split-K with cuDNN: the number of splits and the merge, without a GPU.

A plain softmax stands in for cuDNN; `test_attention_gpu.py` runs cuDNN itself on a GPU.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax.model.attention import cudnn
from crosslmm_jax.model.attention.blockwise import MASKED, blockwise_attention
from crosslmm_jax.model.attention.dispatch import attention, reference_attention

FRAME = 729


def attention_with_log_sum_exp(q, k, v, lengths):
    stop = jnp.full((q.shape[0],), k.shape[1]) if lengths is None else lengths
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]).astype(jnp.float32)
    scores = jnp.einsum("btkgh,bskh->btkgs", grouped, k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.arange(k.shape[1]) < stop[:, None, None, None, None], scores, -jnp.inf)
    out = jnp.einsum("btkgs,bskh->btkgh", jax.nn.softmax(scores), v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype), jax.nn.logsumexp(scores, axis=-1).reshape(q.shape[:3])


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_merged_splits_equal_attention_to_all_keys(data):
    splits, size, length = (data.draw(st.integers(1, n)) for n in (5, 7, 3))
    kv_heads, groups, batch = (data.draw(st.integers(1, 2)) for _ in range(3))
    keys = splits * size
    lengths = data.draw(st.none() | st.lists(st.integers(1, keys), min_size=batch, max_size=batch))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    q = rng.standard_normal((batch, length, kv_heads * groups, 8), np.float32)
    k, v = (rng.standard_normal((batch, keys, kv_heads, 8), np.float32) for _ in range(2))
    k *= np.linspace(0.1, 9, keys, dtype=np.float32)[:, None, None]  # splits of very different weight
    stop = np.repeat(np.reshape(lengths or [keys] * batch, (-1, 1)), length, axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn, "_with_log_sum_exp", attention_with_log_sum_exp)
        attend = jax.jit(lambda *x: cudnn.split_attention(*x, splits))  # one program, not one per operation
        out, lse = attend(q, k, v, None if lengths is None else jnp.array(lengths))
    zero = np.zeros_like(stop)
    np.testing.assert_allclose(out, jax.jit(reference_attention)(q, k, v, zero, stop), atol=1e-5)
    expected = jax.jit(lambda *x: blockwise_attention(*x, 8**-0.5))(q, k, v, zero, stop)[1]
    np.testing.assert_allclose(lse, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(64, 64), (64, 20), (64, 0)])
def test_only_attention_without_gradients_uses_split_k(monkeypatch, stops):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(cudnn, "MIN_KEYS_PER_SPLIT", 8)
    monkeypatch.setattr(cudnn, "SPLIT_COST", 1)
    monkeypatch.setattr(cudnn, "_with_log_sum_exp", attention_with_log_sum_exp)
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, n, h, 8)), jnp.bfloat16) for n, h in ((3, 4), (64, 2), (64, 2))
    )
    stop = np.repeat(np.reshape(stops, (2, 1)), 3, axis=1).astype(np.int32)
    splits = cudnn.best_num_splits(q.shape, k.shape)
    assert splits > 1

    def attend(q):
        return attention(q, k, v, kv_stop=stop, backend="cudnn")

    expected = reference_attention(*(x.astype(jnp.float32) for x in (q, k, v)), np.zeros_like(stop), stop)
    assert np.linalg.norm(jax.jit(attend)(q).astype(jnp.float32) - expected) < 1e-2 * np.linalg.norm(expected)
    split_queries = f"tensor<{2 * splits}x6x2x8x"
    assert split_queries in jax.jit(attend).lower(q).as_text()
    graded = jax.jit(jax.grad(lambda q: jnp.sum(attend(q).astype(jnp.float32))))
    assert split_queries not in graded.lower(q).as_text()


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "expected"),
    [
        (64, 256 * FRAME, (12, 2), range(18, 19)),  # T2V of the 2B model: 6 blocks
        (64, 256 * FRAME, (28, 4), range(8, 9)),  # of the 7B model: 16 blocks, 128 of 132 places
        (288, 32 * FRAME, (12, 2), range(4, 10)),  # V2V of few frames
        (2304, 256 * FRAME, (12, 2), range(3, 4)),  # 216 blocks are two rounds, 648 are five
        (FRAME, FRAME, (16, 16), range(1)),  # encoder
        (1, 256 * FRAME, (12, 2), range(54, 65)),  # a generated token
        (1, 192 * FRAME, (12, 2), range(32, 65)),  # 64 splits would be odd
        (64, 448003, (12, 2), range(2)),  # a prime: at most one split
    ],
)  # fmt: skip
def test_number_of_splits_fills_the_gpu(queries, keys, heads, expected):
    batch = 32 if queries == FRAME else 1
    splits = cudnn.best_num_splits((batch, queries, heads[0], 128), (batch, keys, heads[1], 128))
    assert splits in expected
    assert keys % 2 or not splits or keys // splits % 2 == 0, "odd splits are copied"


@pytest.mark.slow
def test_a_split_that_no_query_reads_has_no_weight(monkeypatch):
    monkeypatch.setattr(cudnn, "_with_log_sum_exp", attention_with_log_sum_exp)
    q, v = jnp.ones((1, 2, 2, 8)), jnp.ones((1, 12, 1, 8)).at[:, 4:].set(jnp.nan)
    k = jnp.ones((1, 12, 1, 8))
    # Values beyond the length are masked within a split; splits beyond the length must not count either.
    v = jnp.where(jnp.isnan(v), 1e30, v)
    out, lse = cudnn.split_attention(q, k, v, jnp.array([4]), 3)
    np.testing.assert_allclose(out, 1, rtol=1e-6)
    assert float(jnp.min(lse)) > MASKED / 2
