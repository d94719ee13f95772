"""Tokenizers: the one a MODEL folder carries, and the small default one that needs no download.

Text goes in through `Tokenizer.encode_plain`, which never produces a special token: whatever a user types,
`<|im_end|>` included, stays text. Special tokens are placed by their ids, which are looked up by name.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from crosslmm_jax.errors import UserError

PAD_TOKEN = "<|endoftext|>"
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
_SHORT = 100  # characters of a text whose ids are remembered
_MOST_KNOWN = 10_000  # texts

CHAT_TEMPLATE = (
    "{%- if not messages or messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


class Tokenizer:
    """A Hugging Face tokenizer with the ids this project needs, looked up by their text."""

    def __init__(self, hf_tokenizer: Any, folder: str) -> None:
        """Wraps `hf_tokenizer`, read from `folder` (named in errors). Raises UserError on missing tokens."""
        self.hf_tokenizer = hf_tokenizer
        self.folder = folder
        self.pad = self._special_id(PAD_TOKEN)
        self.im_start = self._special_id("<|im_start|>")
        self.im_end = self._special_id("<|im_end|>")
        self.image_pad = self._special_id("<|image_pad|>")
        self.video_pad = self._special_id("<|video_pad|>")
        self._plain = _without_added_tokens(hf_tokenizer.backend_tokenizer)
        self._known: dict[str, list[int]] = {}

    def _special_id(self, text: str) -> int:
        ids = self.hf_tokenizer.get_added_vocab()
        if text not in ids:
            raise UserError(
                f"{self.folder}: the tokenizer has no token {text}; use that of a Qwen2.5 chat model"
            )
        return ids[text]

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the least number of rows the embedding needs."""
        return max(self.hf_tokenizer.get_vocab().values()) + 1

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` in which nothing is special: a literal `<|im_end|>` becomes several tokens."""
        ids = self._known.get(text)
        if ids is None:
            ids = self._plain.encode(text, add_special_tokens=False).ids
            # Headers, system texts and questions of a benchmark come again and again; captions do not.
            if len(text) <= _SHORT and len(self._known) < _MOST_KNOWN:
                self._known[text] = ids
        return list(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out."""
        return self.hf_tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files that `load_tokenizer` reads."""
        self.hf_tokenizer.save_pretrained(os.fspath(folder))


def _without_added_tokens(backend: Any) -> Any:
    """A copy of a `tokenizers.Tokenizer` that recognises no added token in text."""
    from tokenizers import Tokenizer as BackendTokenizer

    description = json.loads(backend.to_str())
    description["added_tokens"] = []
    return BackendTokenizer.from_str(json.dumps(description))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer from `folder`, never from the network.

    Raises:
        UserError: the folder or one of its files is missing or unreadable, or a special token is absent.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such tokenizer folder; give a folder that holds tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} is missing; copy the whole tokenizer folder again")
    # Or transformers tells everybody without torch, who need none here, that it was not found.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        # A MODEL folder's config.json names no type that transformers knows, so it would warn of an error in
        # the tokenizers of Mistral.
        hf_tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, use_fast=True, fix_mistral_regex=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: the tokenizer cannot be read ({reason}); copy the folder again") from error
    return Tokenizer(hf_tokenizer, str(path))


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
    from crosslmm_jax.demo import COLOURS, SHAPES, caption_of, question_of

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
