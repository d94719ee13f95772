"""Frames that are appended to a KV cache, against a prefill of all of them with the same visible frames."""

import jax
import numpy as np
import pytest

from crosslmm_jax.model import CrossLMM, Visual, init_params

PARTS = (3, 1, 2)  # frames that are watched first, then appended
ROOM = 8  # frames; the last part is padded to 2 + 2
TEXT = 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "cross",
    [
        {"cross_attn_rope": "time"}, {"v2v_scope": "frame"}, {"directions": ("t2v",)},
        {"v2v_scope": "window", "v2v_window": 2, "cross_attn_rope": "time", "directions": ("v2v",)},
    ],
    ids=lambda cross: "-".join(map(str, cross.values())),
)  # fmt: skip
def test_appended_frames_equal_a_prefill(tiny_config, replace_config, make_batch, cross):
    config = replace_config(tiny_config, cross_attention=cross, merge={"grid": 2})
    model, frames = CrossLMM(config), sum(PARTS)
    variables = {"params": init_params(config, jax.random.key(0))}
    batch = make_batch(config, frames=frames, text=TEXT, before=TEXT)
    c = config.merge.tokens_per_frame
    ends = np.cumsum(PARTS)
    visible = np.zeros_like(batch.tokens)
    visible[:, TEXT:] = np.repeat(np.repeat(ends, PARTS), c)
    batch = batch._replace(visible_frames=batch.visible_frames._replace(counts=visible))
    counts = np.full(2, batch.tokens.shape[1], np.int32)
    visual = jax.jit(lambda v, f: model.apply(v, f, method="encode"))(variables, batch.frames)
    _, expected = model.apply(
        variables, visual, batch, counts, cache_size=64, cache_frames=ROOM, method="prefill"
    )

    first = make_batch(config, frames=PARTS[0], text=TEXT, before=TEXT)
    first = first._replace(tokens=batch.tokens[:, : first.tokens.shape[1]])
    originals = np.zeros((2, ROOM, *visual.originals.shape[2:]), np.float32)
    originals[:, : PARTS[0]] = visual.originals[:, : PARTS[0]]
    part = Visual(visual.compact[:, : PARTS[0] * c], visual.originals[:, : PARTS[0]])
    full = np.full(2, first.tokens.shape[1], np.int32)
    _, cache = model.apply(variables, part, first, full, cache_size=64, cache_frames=ROOM, method="prefill")
    append = jax.jit(lambda *arguments: model.apply(*arguments, method="append"))
    for begin, count in zip(ends[:-1], PARTS[1:], strict=True):
        compact = np.full((2, 2 * c, visual.compact.shape[2]), 7.0, np.float32)
        compact[:, : count * c] = visual.compact[:, begin * c : (begin + count) * c]
        originals[:, begin : begin + 2] = 9.0  # padding that must not matter
        originals[:, begin : begin + count] = visual.originals[:, begin : begin + count]
        cache = append(variables, cache, Visual(compact, originals), np.int32(count))
    np.testing.assert_array_equal(cache.num_tokens, expected.num_tokens)
    np.testing.assert_array_equal(cache.visible_frames, [frames, frames])
    length = int(counts[0])
    for ours, theirs in zip((*cache.keys, *cache.values), (*expected.keys, *expected.values), strict=True):
        np.testing.assert_allclose(ours[:, :length], theirs[:, :length], atol=1e-5)
    for ours, theirs in zip(cache.t2v or (), expected.t2v or (), strict=True):
        np.testing.assert_allclose(ours.keys[:, :frames], theirs.keys[:, :frames], atol=1e-5)
        np.testing.assert_allclose(ours.values[:, :frames], theirs.values[:, :frames], atol=1e-5)
    more = np.array([[5, 6], [7, 8]], np.int32)
    extend = jax.jit(lambda *arguments: model.apply(*arguments, method="extend")[0])
    logits = [extend(variables, each, more, np.full(2, 2, np.int32)) for each in (cache, expected)]
    np.testing.assert_allclose(*logits, atol=1e-5)
