"""How probable each of some given answers is."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from crosslmm_jax.data.text import question_suffix
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference.assistant import Video
from crosslmm_jax.inference.replies import AnswerOptions
from crosslmm_jax.inference.shapes import QUESTION_TOKENS, round_up

_PART = 8  # tokens; options of several are padded to a multiple


def score_options(
    video: Video, question: str, options: Sequence[str], *, answer_prefix: str = ""
) -> Float[np.ndarray, " n"]:
    """Log-probability of each option as the beginning of the answer: float64[n], the sum over its tokens.

    One pass over the question scores the first token of every option. The other tokens of longer options are
    read together in a second pass.

    Args:
      video: what is asked about.
      question: the question.
      options: the answers to compare.
      answer_prefix: text that comes before each of them. It is encoded apart: a space after it belongs to the
        options.

    Raises:
      UserError: the question or an option is empty, or they need too many positions.
    """
    model = video.model
    ids = [model.tokenizer.encode_plain(option) for option in options]
    if not ids or not all(ids):
        raise UserError(f"options are {list(options)}; give at least one, and none of them empty")
    asked = question_suffix(question, model.tokenizer, answer_prefix=answer_prefix).ids
    cached, longest = video.prefix.lengths[0], max(map(len, ids))
    model.check_positions(cached, len(asked), longest)
    room = round_up(longest, _PART) + QUESTION_TOKENS
    cache = model.with_room(video.prefix.cache, cached + len(asked) + room)
    rows = AnswerOptions(max_new_tokens=1).row(model.ends)
    vocab_size = model.tokenizer.vocab_size
    _, logits, state = model.compiled.read(model.params, cache, [asked], rows, vocab_size=vocab_size)
    first = np.asarray(logits, np.float64)[0, :vocab_size]
    first -= np.logaddexp.reduce(first)
    scores = first[[option[0] for option in ids]]
    if longest == 1:
        return scores
    # Row i reads option i without its last token; the targets are the tokens that follow.
    shape = (len(ids), round_up(longest - 1, _PART))
    tokens, targets, counted = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    for row, option in enumerate(ids):
        rest = len(option) - 1
        tokens[row, :rest], targets[row, :rest], counted[row, :rest] = option[:-1], option[1:], True
    after = model.compiled.score(model.params, cache.t2v, state.cache, tokens, targets, vocab_size=vocab_size)
    return scores + np.where(counted, np.asarray(after, np.float64), 0).sum(axis=1)
