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
    count_plain_tokens,
    count_tokens,
    further_media,
    media_prefix,
    next_question,
    question_suffix,
    tokenise,
)
from crosslmm_jax.data.text.layout import Layout, lay_out, pad_rows
from crosslmm_jax.data.text.time_instruction import ClipMeta, most_time_tokens, time_text, wording_tokens
from crosslmm_jax.data.text.tokenizer import PAD_TOKEN, Tokenizer, load_tokenizer
from crosslmm_jax.data.text.turns import Turn, check_placeholders, parse_turns, writable

__all__ = [
    "ClipMeta", "DEFAULT_SYSTEM_PROMPT", "Layout", "MEDIUM", "PAD_TOKEN", "TokenSequence", "Tokenizer",
    "Turn", "check_placeholders", "check_question", "count_plain_tokens", "count_tokens", "further_media",
    "lay_out", "load_tokenizer", "media_prefix", "most_time_tokens", "next_question", "pad_rows",
    "parse_turns", "question_suffix", "time_text", "tokenise", "wording_tokens", "writable",
]  # fmt: skip
