"""Conversations to token ids and targets of the loss, with places for media.

turns             turns of a row and their placeholders
tokenizer         the tokenizer of a MODEL folder
chat              turns to ids and targets (the loss mask); prompts of inference
time_instruction  the sentence about a video's length and frame times
"""

from crosslmm_jax.data.text.chat import (
    DEFAULT_SYSTEM_PROMPT,
    MEDIUM,
    TokenSequence,
    check_question,
    count_tokens,
    next_question,
    plain_sequence,
    question_suffix,
    tokenise,
    video_prefix,
)
from crosslmm_jax.data.text.layout import Layout, lay_out
from crosslmm_jax.data.text.time_instruction import ClipMeta, most_time_tokens, time_text, wording_tokens
from crosslmm_jax.data.text.tokenizer import PAD_TOKEN, Tokenizer, load_tokenizer
from crosslmm_jax.data.text.turns import Turn, check_placeholders, parse_turns, writable

__all__ = [
    "ClipMeta", "Layout", "lay_out", "DEFAULT_SYSTEM_PROMPT", "MEDIUM", "PAD_TOKEN", "TokenSequence",
    "Tokenizer", "Turn", "check_placeholders", "check_question", "count_tokens", "load_tokenizer",
    "most_time_tokens", "next_question", "parse_turns", "plain_sequence", "question_suffix", "time_text",
    "tokenise", "video_prefix", "wording_tokens", "writable",
]  # fmt: skip
