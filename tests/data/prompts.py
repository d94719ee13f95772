"""The whole prompt of a question, put together from the pieces that inference prefills one after another."""

from collections.abc import Sequence

import numpy as np

from crosslmm_jax.data.text.chat import TokenSequence, media_prefix, next_question, question_suffix
from crosslmm_jax.data.text.tokenizer import Tokenizer


def answer_header(tokenizer: Tokenizer) -> list[int]:
    """Ids after which an answer is generated."""
    return [tokenizer.im_start, *tokenizer.encode_plain("assistant\n")]


def whole_prompt(
    question: str,
    tokenizer: Tokenizer,
    *,
    history: Sequence[tuple[str, str]] = (),
    time_text: str | None = None,
) -> TokenSequence:
    """The prompt of `question` about one video, after earlier (question, answer) pairs."""
    asked = [earlier for earlier, _ in history] + [question]
    ids = media_prefix(tokenizer, [time_text]).ids.tolist()
    ids += question_suffix(asked[0], tokenizer).ids.tolist()
    for (_, answer), following in zip(history, asked[1:], strict=True):
        ids += tokenizer.encode_plain(answer) + next_question(following, tokenizer).ids.tolist()
    return TokenSequence(np.array(ids, np.int32), np.zeros(len(ids), bool))
