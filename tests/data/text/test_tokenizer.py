"""Special tokens by name, user text that stays plain, and damaged folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from crosslmm_jax.demo.tokenizer import EXTRA_TOKENS, SPECIAL_TOKENS, write_default_tokenizer
from crosslmm_jax.errors import UserError


@pytest.mark.slow
def test_special_tokens_follow_the_vocabulary_in_order(any_tokenizer: Tokenizer) -> None:
    added = any_tokenizer.hf_tokenizer.get_added_vocab()
    names = SPECIAL_TOKENS + EXTRA_TOKENS
    assert sorted(added, key=added.__getitem__) == list(names)
    ids = sorted(added.values())
    assert ids == list(range(ids[0], ids[0] + len(names)))
    assert any_tokenizer.vocab_size == ids[-1] + 1
    assert any_tokenizer.pad == added["<|endoftext|>"]
    assert any_tokenizer.video_pad == added["<|video_pad|>"]


def test_default_tokenizer_fits_and_is_the_same_each_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert 450 <= tokenizer.vocab_size <= 512
    for name in ("a", "b"):
        write_default_tokenizer(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", SPECIAL_TOKENS + EXTRA_TOKENS)
def test_special_text_of_a_user_is_plain(any_tokenizer: Tokenizer, name: str) -> None:
    special = set(any_tokenizer.hf_tokenizer.get_added_vocab().values())
    text = f"Is {name} a token?"
    ids = any_tokenizer.encode_plain(text)
    assert not special & set(ids)
    assert any_tokenizer.decode(ids) == text
    assert special & set(any_tokenizer.hf_tokenizer(text)["input_ids"])  # the bare tokenizer is fooled


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    import unicodedata

    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode_plain(text)) == text


def test_ids_handed_out_can_be_changed_without_harm(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_plain("a short text")
    before = list(ids)
    ids.append(0)
    assert tokenizer.encode_plain("a short text") == before


def test_decode_leaves_special_tokens_out(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.im_start, *tokenizer.encode_plain("hello"), tokenizer.im_end, tokenizer.pad]
    assert tokenizer.decode(ids) == "hello"


def test_save_and_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "What shape is the red object? <|im_end|>"
    assert again.encode_plain(text) == tokenizer.encode_plain(text)
    assert again.hf_tokenizer.chat_template == tokenizer.hf_tokenizer.chat_template


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_file_is_named(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(UserError, match=f"copy: {name} is missing"):
        load_tokenizer(tmp_path / "copy")


def test_missing_folder_damaged_file_and_missing_token(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such tokenizer folder"):
        load_tokenizer(tmp_path / "nowhere")
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    description = json.loads(file.read_text())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["content"] != "<|video_pad|>"
    ]
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"copy: the tokenizer has no token <\|video_pad\|>"):
        load_tokenizer(tmp_path / "copy")
    file.write_text("{")
    with pytest.raises(UserError, match="copy: the tokenizer cannot be read") as caught:
        load_tokenizer(tmp_path / "copy")
    assert "\n" not in str(caught.value)


def test_too_small_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size is 100; it must be at least 278"):
        write_default_tokenizer(tmp_path, vocab_size=100)


@pytest.mark.slow
def test_no_word_of_other_models_tokenizers(tmp_path: Path) -> None:
    """A MODEL folder holds a config.json of its own kind; transformers only looks at large vocabularies."""
    write_default_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"~{number}": len(vocabulary) + 1000 + number for number in range(100_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("{}")
    words = (
        "import sys; from crosslmm_jax.data.text.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])"
    )
    result = subprocess.run([sys.executable, "-c", words, str(tmp_path)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
