"""The tokenizer of a MODEL folder.

Text goes in through `Tokenizer.encode_plain`, which never produces a special token: whatever a user types,
`<|im_end|>` included, stays text. Special tokens are placed by their ids, which are looked up by name.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from crosslmm_jax.errors import UserError

PAD_TOKEN = "<|endoftext|>"
_SHORT = 100  # characters of a text whose ids are remembered
_MOST_KNOWN = 10_000  # texts


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
