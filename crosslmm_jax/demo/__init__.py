"""The whole path in small: videos, both stages, evaluation, a control, questions."""

from crosslmm_jax.demo.command import run
from crosslmm_jax.demo.synthetic import COLOURS, SHAPES, caption_of, question_of
from crosslmm_jax.demo.tokenizer import write_default_tokenizer

__all__ = [
    "COLOURS",
    "SHAPES",
    "caption_of",
    "question_of",
    "run",
    "write_default_tokenizer",
]
