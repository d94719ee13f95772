"""The demo: the whole path at small scale, from making videos to asking the trained model.

command              runs all steps in order: `run`
synthetic            videos whose questions need a close look, with annotations
tokenizer            a small tokenizer with Qwen2.5's special tokens
recipe               the configs of both stages, of the control and of the evaluation
train_and_evaluate   both stages and their accuracy, here or in another process
evaluate             which questions are answered exactly
ask                  a few questions about one held-out video
report, figure       what is printed, demo.json and demo.png
"""

from crosslmm_jax.demo.command import run
from crosslmm_jax.demo.synthetic import COLOURS, SHAPES, caption_of, question_of
from crosslmm_jax.demo.tokenizer import write_default_tokenizer

__all__ = [
    "COLOURS", "SHAPES", "caption_of", "question_of", "run", "write_default_tokenizer",
]  # fmt: skip
