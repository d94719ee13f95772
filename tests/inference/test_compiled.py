"""How often answering compiles: once for a bucket of text, however long the answer gets."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.inference.compiled import CACHE_BUCKET, TEXT_BUCKET, Compiled
from crosslmm_jax.inference.generate import Sampling, generate
from crosslmm_jax.model import init_params, separate_layers
from crosslmm_jax.parallel import make_mesh

LONG, CHUNK, NEVER = 200, 16, -1


@pytest.fixture(scope="module")
def events() -> Iterator[list[str]]:
    """Grows by one for each program that XLA compiles, whoever asked for it."""
    seen: list[str] = []

    def listen(name: str, seconds: float, **_: object) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


class Talk:
    """A conversation about four frames, as `Chat` holds it, without a tokenizer."""

    def __init__(self, config, batch) -> None:
        self.config, self.params = config, separate_layers(init_params(config, jax.random.key(0)))
        self.compiled = Compiled(config, make_mesh(MeshConfig(), jax.devices()[:1]))
        visual = self.compiled.encode(self.params, batch.frames)
        self.prefix = self.compiled.prefill(self.params, visual, batch._replace(frames=None, loss_mask=None))
        self.held = batch.tokens.shape[1]

    def answer(self, question: int, length: int) -> int:
        """Tokens that were made, of `length`, for a question of so many tokens."""
        arguments = {"vocab_size": self.config.decoder.vocab_size, "end": NEVER}
        ids = np.arange(question, dtype=np.int32) + 3
        state = self.compiled.begin(
            self.params, self.prefix, ids, room=question + length, key=jax.random.key(0), sampling=Sampling(),
            fresh=True, **arguments,
        )  # fmt: skip
        made = 0
        while made < length:
            _, count, state = self.compiled.generate(
                self.params, self.prefix.t2v, state, min(CHUNK, length - made), Sampling(), steps=CHUNK,
                **arguments,
            )  # fmt: skip
            made += count
        return made


@pytest.fixture(scope="module")
def talk(make_batch):
    from crosslmm_jax import presets

    config = presets.tiny()
    return Talk(config, make_batch(config, batch=1, frames=4, text=8))


@pytest.mark.slow
def test_generating_compiles_once(talk, events):
    programs = generate._cache_size()
    talk.answer(5, CHUNK)
    assert generate._cache_size() == programs + 1
    assert events, "compiling was not counted"
    # The same bucket of the cache, twelve times the text.
    assert talk.held + 5 + LONG <= CACHE_BUCKET
    talk.answer(5, LONG - 1)  # also a last chunk that is not full
    compiled = len(events)
    assert talk.answer(5, LONG) == LONG
    assert len(events) == compiled
    assert generate._cache_size() == programs + 1


@pytest.mark.slow
def test_text_that_stays_in_its_bucket_does_not_compile(talk, events):
    talk.answer(5, CHUNK)
    compiled, programs = len(events), generate._cache_size()
    for question in (1, 6, TEXT_BUCKET):
        talk.answer(question, CHUNK)
    assert len(events) == compiled
    talk.answer(TEXT_BUCKET + 1, CHUNK)  # the next bucket: the question's program, not the loop's
    assert len(events) == compiled + 1
    assert generate._cache_size() == programs
    talk.answer(TEXT_BUCKET + 1, CACHE_BUCKET)  # more room than one bucket of the cache has
    assert generate._cache_size() == programs + 1
