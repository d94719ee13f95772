"""Sampling and the loop on the device, against plain numpy and the full forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax.batch import Batch
from crosslmm_jax.inference.generate import USUAL_ENDS, RowSettings, Sampling, generate, start
from crosslmm_jax.model import CrossLMM, KVCache, init_params


def frequencies(logits, sampling: Sampling, *, vocab_size: int, count: int = 4000) -> np.ndarray:
    many = jnp.tile(jnp.asarray(logits)[None], (count, 1))
    rows = RowSettings.joined([RowSettings.of(sampling, seed=seed) for seed in range(count)])
    drawn = draw(many, rows, vocab_size)
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / count


def draw(logits, rows: RowSettings, vocab_size: int):
    """The first token of each row."""
    none = jnp.zeros(len(logits), jnp.int32)
    return start(logits, KVCache((), (), none, none, None), rows, none, vocab_size=vocab_size).token


def test_draw_follows_temperature_and_top_p():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05, 0.0001], np.float32))
    assert frequencies(logits, Sampling(), vocab_size=5)[0] == 1
    np.testing.assert_allclose(
        frequencies(logits, Sampling(1.0), vocab_size=5), [0.5, 0.3, 0.15, 0.05, 0], atol=0.03
    )
    # 0.5 + 0.3 are not yet 0.9: the third token is needed, the fourth is not.
    np.testing.assert_allclose(
        frequencies(logits, Sampling(1.0, 0.9), vocab_size=5),
        np.array([0.5, 0.3, 0.15, 0, 0]) / 0.95,
        atol=0.03,
    )
    assert frequencies(logits, Sampling(5.0, 0.01), vocab_size=5)[0] == 1
    squared = np.array([0.25, 0.09, 0.0225, 0.0025, 0])
    np.testing.assert_allclose(
        frequencies(logits, Sampling(0.5), vocab_size=5), squared / squared.sum(), atol=0.03
    )


def test_rows_beyond_the_tokenizer_are_never_drawn():
    logits = np.array([0.0, 0.0, 9.0], np.float32)
    assert frequencies(logits, Sampling(), vocab_size=2)[2] == 0
    assert frequencies(logits, Sampling(3.0), vocab_size=2)[2] == 0


def test_any_number_of_tokens_may_end_an_answer():
    ends = range(3, 3 + 2 * USUAL_ENDS)
    rows = RowSettings.of(ends=ends)
    cache = KVCache((), (), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), None)
    for last, ended in ((ends[-1], True), (ends[-1] + 1, False)):
        logits = jax.nn.one_hot(jnp.array([last]), 64)
        assert bool(start(logits, cache, rows, jnp.zeros(1, jnp.int32), vocab_size=64).ended[0]) == ended


def test_the_most_probable_token_is_found_without_ordering_the_vocabulary():
    """Temperature is no constant of the program, so both ways are in it; one of them runs."""
    rows = RowSettings.joined([RowSettings.of()] * 2)
    jaxpr = jax.make_jaxpr(lambda x, rows: draw(x, rows, 90))(jnp.zeros((2, 100)), rows)
    (cond,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond")
    assert "sort" not in str([eqn for eqn in jaxpr.eqns if eqn is not cond])
    assert sorted("sort" in str(branch) for branch in cond.params["branches"]) == [False, True]


def greedy_by_full_forward(model, params, batch, *, steps: int) -> list[int]:
    """One forward over the whole sequence per token: slow, and without a cache that could be wrong.

    Room for the tokens to come is there from the start, so that one program serves all steps: a token sees
    none after it.
    """
    length, made = batch.tokens.shape[1], []
    tokens = np.pad(batch.tokens, ((0, 0), (0, steps)))
    seen = np.pad(batch.visible_frames.counts, ((0, 0), (0, steps)), mode="edge")
    forward = jax.jit(model.apply)
    for end in range(length, length + steps):
        whole = Batch.create(
            tokens=tokens, frames=batch.frames, visual_slots=batch.visual_slots, visible_frames=seen
        )
        made.append(int(forward({"params": params}, whole)[0, end - 1].argmax()))
        tokens[0, end] = made[-1]
    return made


@pytest.mark.slow
def test_generation_equals_the_full_forward_and_stops(tiny_config, replace_config, make_batch):
    # Untied: with a tied head a random model repeats its last token for ever.
    tiny_config = replace_config(tiny_config, decoder={"tie_embeddings": False})
    params = init_params(tiny_config, jax.random.key(3))
    model = CrossLMM(tiny_config)
    batch = make_batch(tiny_config, batch=1, frames=3, text=8)
    expected = greedy_by_full_forward(model, params, batch, steps=7)
    visual = jax.jit(lambda: model.apply({"params": params}, batch.frames, method="encode"))()
    counts = np.array([batch.tokens.shape[1]], np.int32)
    arguments = {"vocab_size": tiny_config.decoder.vocab_size}

    prefill = jax.jit(
        lambda: model.apply({"params": params}, visual, batch, counts, cache_size=32, method="prefill")
    )

    def begin(rows: RowSettings):
        logits, cache = prefill()
        return start(logits, cache._replace(t2v=None), rows, jnp.zeros(1, jnp.int32), **arguments), cache.t2v

    def run(state, t2v, rows: RowSettings):
        tokens, ended, state = generate(model, params, t2v, state, rows, steps=4, **arguments)
        return tokens[0, tokens[0] >= 0].tolist(), bool(ended[0]), state

    rows = RowSettings.of(limit=7)
    state, t2v = begin(rows)
    first, _, state = run(state, t2v, rows)
    second, ended, state = run(state, t2v, rows)
    assert first + second == expected and len(second) == 3 and not ended
    assert run(state, t2v, rows)[0] == []
    end = next(token for token in expected if token != expected[0])
    rows = RowSettings.of(limit=7, ends=(99999, end))
    state, t2v = begin(rows)
    tokens, ended, state = run(state, t2v, rows)
    assert tokens == expected[: expected.index(end)][:4] and ended == (expected.index(end) < 5)
    programs = generate._cache_size()
    for limit in (1, 2, 3):
        rows = RowSettings.of(limit=limit)
        assert len(run(*begin(rows), rows)[0]) == limit
    assert generate._cache_size() == programs


def test_a_row_draws_the_same_beside_any_neighbours():
    """Its own seed, temperature and count decide."""
    logits = jax.random.normal(jax.random.key(0), (1, 50))
    row = RowSettings.of(Sampling(1.0, 0.9), seed=5)
    alone = int(draw(logits, row, 50)[0])
    others = [RowSettings.of(Sampling(t, p), seed=s) for t, p, s in ((0.0, 1.0, 1), (2.0, 0.5, 5))]
    together = draw(jnp.tile(logits, (3, 1)), RowSettings.joined([others[0], row, others[1]]), 50)
    assert int(together[1]) == alone
    assert int(together[0]) == int(logits.argmax())
    draws = {int(draw(logits, RowSettings.of(Sampling(2.0), seed=seed), 50)[0]) for seed in range(20)}
    assert len(draws) > 5
