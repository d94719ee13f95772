"""The tokenizer of a MODEL folder, read by the `tokenizers` library alone.

`Tokenizer.encode_plain` encodes text and never produces a special token: a literal `<|im_end|>` stays text.
Special tokens are inserted by their ids. Ids and texts are those of `AutoTokenizer`, whose import takes ten
times as long as all of this.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslmm_jax.errors import UserError, first_line
from crosslmm_jax.utils import cannot_read, is_lfs_pointer

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as BackendTokenizer

PAD_TOKEN = "<|endoftext|>"
_FILES = ("tokenizer.json", "tokenizer_config.json")
_SHORT = 100  # characters; the ids of pieces of text up to this length are cached
_MOST_CACHED = 50_000  # pieces
_BEFORE_WORD = re.compile(r"(?<=[!-~])(?= [!-~])")  # one space between two visible characters of ASCII
_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_QWEN_SPLIT = {
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
_OTHER_SPLITS = (
    _GPT2_SPLIT | {"use_regex": False},
    {"type": "Digits", "individual_digits": True},
    {"type": "Digits", "individual_digits": False},
)


class Tokenizer:
    """Text to ids and back, and the ids of the special tokens of prompts.

    A copy in another process reads the folder again, which is faster than to send the vocabulary.

    Attributes:
        folder: where it was read.
        pad, im_start, im_end, video_pad: ids of special tokens.
        vocab_size: one more than the highest id: the rows that the embedding needs at least.
    """

    def __init__(self, backend: "BackendTokenizer", folder: str, digest: str) -> None:
        """Wraps `backend`, read from files of `folder` that have `digest`; see `load_tokenizer`.

        Raises:
            UserError: a special token is missing.
        """
        self.folder = folder
        self._digest = digest
        self._backend = backend
        self._plain = _without_added_tokens(backend)
        self._added = {token.content: id for id, token in backend.get_added_tokens_decoder().items()}
        self.pad = self._special_id(PAD_TOKEN)
        self.im_start = self._special_id("<|im_start|>")
        self.im_end = self._special_id("<|im_end|>")
        self._special_id("<|image_pad|>")  # Qwen2.5 has it; a tokenizer without it is another family's
        self.video_pad = self._special_id("<|video_pad|>")
        self.vocab_size = 1 + max(_highest_id(self._plain), *self._added.values())
        self._splits_at_words = _splits_at_words(self._plain)
        self._cached: dict[str, list[int]] = {}

    def _special_id(self, text: str) -> int:
        if text not in self._added:
            raise UserError(
                f"{self.folder}: the tokenizer has no token {text}; use that of a Qwen2.5 chat model"
            )
        return self._added[text]

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (os.path.abspath(self.folder), self._digest)

    def ids_of(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of tokens, each given by its whole text. Raises UserError if one is missing."""
        ids = {text: self._backend.token_to_id(text) for text in texts}
        if missing := [text for text, token in ids.items() if token is None]:
            raise UserError(
                f"{self.folder}: the tokenizer has no token {', '.join(missing)}; use the tokenizer that"
                " belongs to the model"
            )
        return tuple(token for token in ids.values() if token is not None)

    def vocabulary(self) -> dict[str, int]:
        """A new dict of all tokens to their ids, added ones too. It takes a while for a real vocabulary."""
        return self._backend.get_vocab()

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` without special tokens: a literal `<|im_end|>` becomes several tokens."""
        return [token for piece in self._pieces(text) for token in piece]

    def count_plain(self, text: str) -> int:
        """Number of ids of `encode_plain`."""
        return sum(map(len, self._pieces(text)))

    def _pieces(self, text: str) -> Iterator[list[int]]:
        """The ids of `text` piece by piece: most words have been seen before, and most texts have not."""
        pieces = _BEFORE_WORD.split(text) if self._splits_at_words else [text]
        for piece in pieces:
            ids = self._cached.get(piece)
            yield self._encode(piece) if ids is None else ids

    def _encode(self, piece: str) -> list[int]:
        # The fast call leaves out the place of each token in the text, which nothing here needs.
        ids = self._plain.encode_batch_fast([piece], add_special_tokens=False)[0].ids
        if len(piece) <= _SHORT and len(self._cached) < _MOST_CACHED:
            self._cached[piece] = ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, with added tokens such as `<tool_call>` but without special ones."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)


def _without_added_tokens(backend: "BackendTokenizer") -> "BackendTokenizer":
    """A tokenizer that recognises no added token in text. It shares the vocabulary of `backend`."""
    from tokenizers import Tokenizer as BackendTokenizer

    plain = BackendTokenizer(backend.model)
    plain.normalizer = backend.normalizer
    plain.pre_tokenizer = backend.pre_tokenizer
    return plain


def _splits_at_words(plain: "BackendTokenizer") -> bool:
    """Whether the ids of a text are those of its pieces, where it is split at `_BEFORE_WORD`.

    They are where the tokenizer itself splits there before it merges bytes. The patterns of GPT-2 and of
    Qwen2.5 do: none of their alternatives takes a space after a visible character.
    """
    from tokenizers import models

    if not isinstance(plain.model, models.BPE) or plain.model.dropout:
        return False
    parts = [json.loads(part.__getstate__()) for part in (plain.normalizer, plain.pre_tokenizer) if part]
    steps = [step for part in parts for step in part.get("pretokenizers", part.get("normalizers", [part]))]
    steps = [step for step in steps if step != {"type": "NFC"}]
    known = (_GPT2_SPLIT, _QWEN_SPLIT)
    return any(step in known for step in steps) and all(step in (*known, *_OTHER_SPLITS) for step in steps)


def _highest_id(backend: "BackendTokenizer") -> int:
    """The highest id of a tokenizer without added tokens."""
    size = backend.get_vocab_size()
    if None in map(backend.id_to_token, range(size)):  # some ids are not used
        return max(backend.get_vocab().values())
    return size - 1


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer from `folder`.

    Raises:
        UserError: the folder or one of its files is missing or damaged, or it lacks a special token.
    """
    from tokenizers import Tokenizer as BackendTokenizer

    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{path}: no such tokenizer folder; give a folder that holds tokenizer.json")
    for name in _FILES:
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} is missing; copy the whole folder again")
    try:
        content, config = ((path / name).read_bytes() for name in _FILES)
        backend = BackendTokenizer.from_buffer(content)
        backend.add_tokens(_tokens_of_config(json.loads(config), backend))
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        reason = first_line(error)
        pointers = (path / name for name in _FILES if is_lfs_pointer(path / name))
        raise cannot_read(
            next(pointers, path), f"the tokenizer cannot be read ({reason}); copy the folder again"
        ) from error
    digest = hashlib.blake2b(content + config, digest_size=12).hexdigest()
    return Tokenizer(backend, str(path), digest)


def _tokens_of_config(config: Mapping[str, Any], backend: "BackendTokenizer") -> list["AddedToken"]:
    """Tokens that tokenizer_config.json adds to those of tokenizer.json, as transformers does."""
    from tokenizers import AddedToken

    present = backend.get_added_tokens_decoder().values()
    described = {int(id): AddedToken(**token) for id, token in config.get("added_tokens_decoder", {}).items()}
    found = [token for _, token in sorted(described.items()) if repr(token) not in set(map(repr, present))]
    names = {token.content for token in [*present, *found]}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special = [value for key, value in config.items() if key.endswith("_token")]
    for value in [*special, *(extra.values() if isinstance(extra, dict) else extra)]:
        text = value["content"] if isinstance(value, dict) else value
        if isinstance(text, str) and text not in names:
            names.add(text)
            found.append(AddedToken(text, special=True))
    return found


def _load_again(folder: str, digest: str) -> Tokenizer:
    """`load_tokenizer` for a copy in another process. Raises UserError if the files have changed."""
    tokenizer = load_tokenizer(folder)
    if tokenizer._digest != digest:
        raise UserError(
            f"{folder}: the tokenizer changed while it was in use; put the old files back, or start again"
        )
    return tokenizer
