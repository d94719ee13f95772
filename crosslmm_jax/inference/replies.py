"""Answers as they grow: rows of tokens from the device to texts, with their ends."""

import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import PyTree

from crosslmm_jax.data.text import Tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.compiled import Compiled
from crosslmm_jax.inference.generate import RowSettings, Sampling
from crosslmm_jax.inference.shapes import STEPS
from crosslmm_jax.model import KVCache


class Options(TypedDict, total=False):
    """The fields of `AnswerOptions`, as keyword arguments."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop: Sequence[str] | str
    answer_prefix: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How an answer is generated.

    Attributes:
        max_new_tokens: most tokens of the answer.
        sampling: how tokens are drawn.
        seed: of sampling.
        stop: text or texts that end the answer, which does not contain them.
        answer_prefix: text that the answer continues; it is not repeated in the answer.
    """

    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: Sequence[str] | str = ()
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for a value of the wrong type or out of range."""
        temperature, top_p = self.sampling
        for name, kind in (("max_new_tokens", int), ("seed", int), ("answer_prefix", str)):
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{name} is {value!r}; it must be of type {kind.__name__}")
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; it must be 1 or more")
        if not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
            raise UserError(
                f"--temperature {temperature} --top-p {top_p}: the temperature must be 0 or more, and top-p"
                " above 0 and at most 1"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop is {stop!r}; give texts, none of them empty")
        stop = tuple(stop)
        object.__setattr__(self, "stop", stop)

    def row(self, ends: Sequence[int]) -> RowSettings:
        """The settings of one row of a batch, whose answers also end with the tokens `ends`."""
        return RowSettings.of(self.sampling, seed=self.seed, limit=self.max_new_tokens, ends=ends)


class Reply:
    """One answer, as far as it has come.

    Attributes:
        ids: its tokens, without an end token.
        text: its text so far; what may still turn out to be a stop text is left out.
        finish_reason: "stop" after an end token or a stop text, "length" after `max_new_tokens`, None before.
        first_at: when the first token was there, by `time.perf_counter`.
    """

    def __init__(self, tokenizer: Tokenizer, options: AnswerOptions) -> None:
        """Starts without a token."""
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: Literal["stop", "length"] | None = None
        self.first_at = 0.0
        self._tokenizer, self._options = tokenizer, options

    def add(self, ids: Sequence[int], *, ended: bool = False) -> None:
        """Adds tokens; `ended`: an end token follows them."""
        if self.finish_reason is not None:
            return
        self.ids += ids
        text = self._tokenizer.decode(self.ids)
        found = min((at for stop in self._options.stop if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.text, self.finish_reason = text[:found], "stop"
            while len(self._tokenizer.decode(self.ids)) > found:
                self.ids.pop()
        elif ended or len(self.ids) >= self._options.max_new_tokens:
            self.text, self.finish_reason = text, "stop" if ended else "length"
        else:
            # A character that still lacks bytes, and the beginning of a stop text, may yet change.
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
            self.text = text[: len(text) - _held_back(text, self._options.stop)]


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop text."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def replies(
    compiled: Compiled,
    params: PyTree,
    cache: KVCache,
    questions: Sequence[np.ndarray],
    options: Sequence[AnswerOptions],
    *,
    tokenizer: Tokenizer,
    ends: Sequence[int],
) -> Generator[list[Reply], None, KVCache]:
    """Answers one question per row together; yields the answers each time they have grown.

    Args:
        compiled: the programs.
        params: the parameters.
        cache: what comes before the questions; not modified. It needs room for questions and answers.
        questions: int32[n] each. With fewer rows in the cache, each row serves neighbouring questions.
        options: of each question.
        tokenizer: gives the texts.
        ends: tokens that end an answer.

    Returns:
        The cache with each question and answer.
    """
    rows = RowSettings.joined([option.row(ends) for option in options])
    of_vocabulary = {"vocab_size": tokenizer.vocab_size}
    first, _, state = compiled.read(params, cache, questions, rows, **of_vocabulary)
    grown = [Reply(tokenizer, option) for option in options]
    np.asarray(first)
    for reply in grown:
        reply.first_at = time.perf_counter()
    while not all(reply.finish_reason for reply in grown):
        tokens, ended, state = compiled.generate(params, cache.t2v, state, rows, steps=STEPS, **of_vocabulary)
        tokens, ended = np.asarray(tokens), np.asarray(ended)
        for row, reply in enumerate(grown):
            reply.add(tokens[row, tokens[row] >= 0].tolist(), ended=bool(ended[row]))
        going = np.array([reply.finish_reason is None for reply in grown])
        rows = rows._replace(limit=np.where(going, rows.limit, 0))  # nothing more after a stop text
        yield grown
    lengths = [len(ids) + len(reply.ids) for ids, reply in zip(questions, grown, strict=True)]
    before = np.repeat(np.asarray(cache.num_tokens), len(questions) // len(cache.num_tokens))
    return state.cache._replace(num_tokens=(before + lengths).astype(np.int32), t2v=cache.t2v)
