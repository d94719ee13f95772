"""A small tokenizer with the special tokens of Qwen2.5, trained here on a few sentences: no download."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from crosslmm_jax.data.text import PAD_TOKEN
from crosslmm_jax.demo.synthetic import COLOURS, SHAPES, caption_of, question_of
from crosslmm_jax.errors import UserError

# The names and the order are those of Qwen2.5, so that either vocabulary serves the same code.
SPECIAL_TOKENS = (
    PAD_TOKEN, "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Recognised in text by the Hugging Face tokenizer like the ones above, but kept when ids are decoded.
EXTRA_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{%- if not messages or messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def write_default_tokenizer(folder: str | os.PathLike[str], vocab_size: int = 512) -> None:
    """Writes a small byte-level BPE with Qwen2.5's special tokens, trained on text made here.

    The result depends on `vocab_size` alone. Every text can be encoded, because all 256 bytes are tokens.

    Args:
        folder: created when missing.
        vocab_size: at most this many ids, special tokens included; at least 278 (bytes and special tokens).
    """
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as BackendTokenizer

    added = [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    added += [AddedToken(text, special=False, normalized=False) for text in EXTRA_TOKENS]
    if vocab_size < 256 + len(added):
        raise UserError(f"vocab_size is {vocab_size}; it must be at least {256 + len(added)}")
    backend = BackendTokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(_training_text(), trainer)
    backend.add_tokens(added)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 32768,
        "pad_token": PAD_TOKEN,
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _training_text() -> Iterator[str]:
    """Sentences about videos, and the words of the synthetic set, from which merges are learnt."""
    for start in range(len(SHAPES)):
        shapes = [SHAPES[(start + step * (start + 1)) % len(SHAPES)] for step in range(len(COLOURS))]
        yield caption_of(shapes)
        for colour, shape in zip(COLOURS, shapes, strict=True):
            yield question_of(colour)
            yield shape
    for role in ("system", "user", "assistant"):
        yield from [f"{role}\n"] * 20
    yield from ["You are a helpful assistant."] * 20
    subjects = ("The man", "A woman", "The child", "A dog", "The player", "Someone in the video")
    actions = (
        "is walking to the door", "is holding a small box", "throws the ball into the air",
        "looks at the camera and speaks", "sits down on the left side", "is cooking with another person",
        "opens the window before the light turns off", "runs across the street after the car",
    )  # fmt: skip
    for subject in subjects:
        for action in actions:
            yield f"{subject} {action}."
    yield from (
        "What is happening in this video?", "What does the person do first, and what happens next?",
        "Describe the scene in one sentence.", "How many people are there?", "Where was it filmed?",
        "Which of these options is right? Answer with the letter of the option.", "Yes, it is.",
        "No, it is not.",
        "The video shows an object that moves from the top to the bottom of the frame.",
        "At the beginning the background is dark; later the colours change.",
    )  # fmt: skip
