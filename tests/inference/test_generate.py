"""Sampling and the loop on the device, against plain numpy and the full forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax.batch import Batch
from crosslmm_jax.inference.generate import Sampling, draw, generate, start
from crosslmm_jax.model import CrossLMM, init_params


def frequencies(logits, sampling: Sampling, *, vocab_size: int, count: int = 4000) -> np.ndarray:
    rows = jnp.tile(jnp.asarray(logits)[None], (count, 1))
    drawn = draw(rows, jax.random.key(0), sampling, vocab_size=vocab_size)
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / count


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


def test_the_most_probable_token_is_found_without_ordering_the_vocabulary():
    """Temperature is no constant of the program, so both ways are in it; one of them runs."""
    jaxpr = jax.make_jaxpr(lambda x, t: draw(x, jax.random.key(0), Sampling(t), vocab_size=90))(
        jnp.zeros((2, 100)), 0.0
    )
    (cond,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond")
    assert "sort" not in str([eqn for eqn in jaxpr.eqns if eqn is not cond])
    assert sorted("sort" in str(branch) for branch in cond.params["branches"]) == [False, True]


def greedy_by_full_forward(model, params, batch, *, steps: int) -> list[int]:
    """One forward over the whole sequence per token: slow, and without a cache that could be wrong."""
    made = []
    for _ in range(steps):
        logits = model.apply({"params": params}, batch)
        made.append(int(logits[0, -1].argmax()))
        seen = batch.visible_frames.counts
        batch = Batch.create(
            tokens=np.append(batch.tokens, np.array([[made[-1]]], np.int32), axis=1), frames=batch.frames,
            visual_slots=batch.visual_slots, visible_frames=np.append(seen, seen[:, -1:], axis=1),
        )  # fmt: skip
    return made


@pytest.mark.slow
def test_generation_equals_the_full_forward_and_stops(tiny_config, replace_config, make_batch):
    # Untied: with a tied head a random model repeats its last token for ever.
    tiny_config = replace_config(tiny_config, decoder={"tie_embeddings": False})
    params = init_params(tiny_config, jax.random.key(3))
    model = CrossLMM(tiny_config)
    batch = make_batch(tiny_config, batch=1, frames=3, text=8)
    expected = greedy_by_full_forward(model, params, batch, steps=7)
    visual = model.apply({"params": params}, batch.frames, method="encode")
    counts = np.array([batch.tokens.shape[1]], np.int32)
    arguments = {"vocab_size": tiny_config.decoder.vocab_size}

    def begin(end: int):
        logits, cache = model.apply(
            {"params": params}, visual, batch, counts, cache_size=32, method="prefill"
        )
        of_text = cache._replace(t2v=None)
        return start(logits, of_text, jax.random.key(0), Sampling(), end=end, **arguments), cache.t2v

    def run(state, t2v, limit: int, end: int):
        tokens, made, state = generate(
            model, params, t2v, state, jnp.int32(limit), Sampling(), steps=4, end=end, **arguments
        )
        return tokens[0, : made[0]].tolist(), state

    absent = -1
    state, t2v = begin(absent)
    first, state = run(state, t2v, 4, absent)
    second, state = run(state, t2v, 3, absent)
    assert first + second == expected
    end = next(token for token in expected if token != expected[0])
    state, t2v = begin(end)
    tokens, state = run(state, t2v, 4, end)
    assert tokens == expected[: expected.index(end)][:4]
    programs = generate._cache_size()
    for limit in (1, 2, 3):
        state, t2v = begin(absent)
        run(state, t2v, limit, absent)
    assert generate._cache_size() == programs
