"""The tokenizer of a MODEL folder.

`Tokenizer.encode_plain` encodes text and never produces a special token: a literal `<|im_end|>` stays text.
Special tokens are inserted by their ids.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslmm_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer

PAD_TOKEN = "<|endoftext|>"
_SHORT = 100  # characters; the ids of texts up to this length are cached
_MOST_CACHED = 10_000  # texts


class Tokenizer:
    """A Hugging Face tokenizer, and the ids of the special tokens of prompts."""

    def __init__(self, hf_tokenizer: Any, folder: str) -> None:
        """Wraps `hf_tokenizer` of `folder`. Raises UserError if a special token is missing."""
        self.hf_tokenizer = hf_tokenizer
        self.folder = folder
        self.pad = self._special_id(PAD_TOKEN)
        self.im_start = self._special_id("<|im_start|>")
        self.im_end = self._special_id("<|im_end|>")
        self._special_id("<|image_pad|>")  # Qwen2.5 has it; a tokenizer without it is another family's
        self.video_pad = self._special_id("<|video_pad|>")
        self._plain = _without_added_tokens(hf_tokenizer.backend_tokenizer)
        self._cached: dict[str, list[int]] = {}

    def _special_id(self, text: str) -> int:
        ids = self.hf_tokenizer.get_added_vocab()
        if text not in ids:
            raise UserError(
                f"{self.folder}: the tokenizer has no token {text}; use that of a Qwen2.5 chat model"
            )
        return ids[text]

    def ids_of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of special tokens. Raises UserError if one is missing."""
        return tuple(self._special_id(text) for text in texts)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows that the embedding needs at least."""
        return max(self.hf_tokenizer.get_vocab().values()) + 1

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` without special tokens: a literal `<|im_end|>` becomes several tokens."""
        ids = self._cached.get(text)
        if ids is None:
            ids = self._plain.encode(text, add_special_tokens=False).ids
            # Headers, system prompts and the questions of a benchmark repeat. Captions do not.
            if len(text) <= _SHORT and len(self._cached) < _MOST_CACHED:
                self._cached[text] = ids
        return list(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens."""
        return self.hf_tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder for `load_tokenizer`."""
        self.hf_tokenizer.save_pretrained(os.fspath(folder))


def _without_added_tokens(backend: "BackendTokenizer") -> "BackendTokenizer":
    """A copy that recognises no added token in text."""
    from tokenizers import Tokenizer as BackendTokenizer

    description = json.loads(backend.to_str())
    description["added_tokens"] = []
    return BackendTokenizer.from_str(json.dumps(description))


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer from `folder`, never from the network.

    Raises:
        UserError: the folder or one of its files is missing or damaged, or it lacks a special token.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such tokenizer folder; give a folder that holds tokenizer.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} is missing; copy the whole folder again")
    # Without this, transformers warns that torch is missing, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        # transformers does not know the model type in a MODEL folder's config.json. Without the last
        # argument it would warn of an error in Mistral's tokenizers.
        hf_tokenizer = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, use_fast=True, fix_mistral_regex=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: the tokenizer cannot be read ({reason}); copy the folder again") from error
    return Tokenizer(hf_tokenizer, str(path))
