"""The ids and texts of transformers, user text that stays plain, and damaged folders."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax.data.index.probe import fingerprint
from crosslmm_jax.data.text.tokenizer import Tokenizer, load_tokenizer
from crosslmm_jax.demo.tokenizer import EXTRA_TOKENS, SPECIAL_TOKENS, write_default_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import copy_tokenizer


@pytest.mark.slow
def test_special_tokens_follow_the_vocabulary_in_order(any_tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    added = hf_tokenizer.get_added_vocab()
    names = SPECIAL_TOKENS + EXTRA_TOKENS
    assert sorted(added, key=added.__getitem__) == list(names)
    ids = sorted(added.values())
    assert ids == list(range(ids[0], ids[0] + len(names)))
    assert any_tokenizer.vocab_size == ids[-1] + 1 == len(hf_tokenizer)
    assert any_tokenizer.pad == added["<|endoftext|>"]
    assert any_tokenizer.video_pad == added["<|video_pad|>"]
    assert (any_tokenizer.im_start, any_tokenizer.im_end) == (added["<|im_start|>"], added["<|im_end|>"])


def test_default_tokenizer_fits_and_is_the_same_each_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert 450 <= tokenizer.vocab_size <= 512
    for name in ("a", "b"):
        write_default_tokenizer(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", SPECIAL_TOKENS + EXTRA_TOKENS)
def test_special_text_of_a_user_is_plain(any_tokenizer: Tokenizer, hf_tokenizer: Any, name: str) -> None:
    special = set(hf_tokenizer.get_added_vocab().values())
    text = f"Is {name} a token?"
    ids = any_tokenizer.encode_plain(text)
    assert not special & set(ids)
    assert any_tokenizer.decode(ids) == text
    assert special & set(hf_tokenizer(text)["input_ids"])  # the bare tokenizer is fooled


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


# Single characters with a code of up to four bytes, marks that join them, and what tokenizers split at.
PIECES = [
    "a", "Z", "the", " the", "Ünï", "ß", "漢字", "かな", "한국", "🎬", "👩\u200d👧", "\u200b", "\ufeff",
    "e\u0301", "\u0301", "\x00", " ", "  ", "      ", "\n", "\r\n", "\n\n\n", "\t", "\u00a0", "\u3000", "7",
    "1234567", "3.14", "'s", "'LL", "...", "?!", "<", "|", ">", "<image>", " a", " 's", " 7", " (", ". ",
    *SPECIAL_TOKENS, *EXTRA_TOKENS,
]  # fmt: skip


@pytest.fixture(scope="session")
def hf_plain(hf_tokenizer: Any) -> Any:
    """The tokenizer of transformers as if no token had been added."""
    from tokenizers import Tokenizer as BackendTokenizer

    description = json.loads(hf_tokenizer.backend_tokenizer.to_str())
    return BackendTokenizer.from_str(json.dumps(description | {"added_tokens": []}))


@settings(max_examples=400, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs"])).map("".join))
def test_ids_are_those_of_transformers(any_tokenizer: Tokenizer, hf_plain: Any, text: str) -> None:
    ids = hf_plain.encode(text, add_special_tokens=False).ids
    assert any_tokenizer.encode_plain(text) == ids
    assert any_tokenizer.count_plain(text) == len(ids)


def test_a_tokenizer_with_tokens_over_two_words(tmp_path: Path) -> None:
    """Words are encoded one by one only where the tokenizer itself splits before each of them."""
    from tokenizers import Tokenizer as BackendTokenizer

    write_default_tokenizer(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    made["pre_tokenizer"] = made["pre_tokenizer"]["pretokenizers"][-1] | {"use_regex": False}
    made["model"]["vocab"]["xĠ"] = 600
    made["model"]["merges"].insert(0, ["x", "Ġ"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    expected = BackendTokenizer.from_str(json.dumps(made)).encode("x x", add_special_tokens=False).ids
    assert expected[0] == 600
    assert load_tokenizer(tmp_path).encode_plain("x x") == expected


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_texts_are_those_of_transformers(any_tokenizer: Tokenizer, hf_tokenizer: Any, data: Any) -> None:
    """Halves of characters, special tokens, other added tokens, and ids that no token has."""
    size = any_tokenizer.vocab_size
    ids = data.draw(st.lists(st.integers(0, 300) | st.integers(0, size + 5) | st.integers(size - 22, size)))
    assert any_tokenizer.decode(ids) == hf_tokenizer.decode(ids, skip_special_tokens=True)


def test_text_of_added_tokens_that_are_not_special(any_tokenizer: Tokenizer) -> None:
    ids = any_tokenizer.vocabulary()
    written = [ids["<|im_start|>"], ids["<tool_call>"], ids["</tool_call>"], ids["<|video_pad|>"]]
    assert any_tokenizer.decode(written) == "<tool_call></tool_call>"


TOKEN = {"content": "<new>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens_decoder": {"600": TOKEN | {"special": True}, "601": TOKEN | {"content": "<b>"}}},
        {"added_tokens_decoder": {"900": TOKEN | {"content": "<tool_call>", "special": True}}},
        {"extra_special_tokens": ["<a>", "<tool_call>", "<b>"], "bos_token": "<bos>"},
        {"extra_special_tokens": {"eye_token": "<eye>"}, "unk_token": None},
        {"additional_special_tokens": ["<a>", "<|im_end|>"], "eye_token": "<eye>"},
        {"unk_token": TOKEN | {"__type": "AddedToken"}, "clean_up_tokenization_spaces": True},
        {"model_max_length": 8, "padding_side": "left", "add_prefix_space": True},
    ],
)
def test_tokens_that_only_the_config_adds(
    tmp_path: Path, tokenizer_folder: Path, changes: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    ours = load_tokenizer(tmp_path / "copy")
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path / "copy", local_files_only=True)
    assert ours.vocabulary() == theirs.get_vocab()
    assert ours.vocab_size == len(theirs)
    for number in range(ours.vocab_size):
        assert ours.decode([number]) == theirs.decode([number], skip_special_tokens=True)
    text = "one , two . <a><new> <tool_call>" * 4
    assert ours.decode(ours.encode_plain(text)) == text


def test_a_vocabulary_with_unused_ids(tmp_path: Path, tokenizer_folder: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["~far"] = 2000
    file.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "copy").vocab_size == 2001


def test_a_tokenizer_that_truncates_is_read_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Files that a training script saved may hold the length that it used."""
    shutil.copytree(tokenizer.folder, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    limit = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": limit}))
    text = "What is happening in this video?"
    assert load_tokenizer(tmp_path / "copy").encode_plain(text) == tokenizer.encode_plain(text)


def test_the_fingerprint_is_that_of_earlier_indexes(any_tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    """Otherwise an index that an earlier version made would not open."""
    vocabulary = sorted(hf_tokenizer.get_vocab().items())
    sample = any_tokenizer.encode_plain("The quick brown fox, 1234.5 s: Ünïcode 漢字\n\n  <image>")
    expected = hashlib.blake2b(json.dumps([vocabulary, sample]).encode(), digest_size=12).hexdigest()
    assert fingerprint(any_tokenizer) == expected
    if any_tokenizer.vocab_size == 151665:
        assert expected == "7eb49ed6b341f09130f0d32e"


def test_a_copy_reads_the_folder_and_sees_a_change(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(load_tokenizer("copy"))
    assert len(sent) < 1000
    monkeypatch.chdir("/")
    assert pickle.loads(sent).encode_plain("hello") == load_tokenizer(tokenizer_folder).encode_plain("hello")
    with open(tmp_path / "copy" / "tokenizer_config.json", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="the tokenizer changed while it was in use"):
        pickle.loads(sent)


@pytest.mark.slow
def test_the_copy_in_a_model_folder_is_the_same(
    any_tokenizer: Tokenizer, hf_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    copy_tokenizer(any_tokenizer.folder, tmp_path)
    (tmp_path / "config.json").write_text("{}")  # of a MODEL folder: transformers knows no such model
    assert load_tokenizer(tmp_path).vocabulary() == any_tokenizer.vocabulary()
    again: Any = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert again.get_vocab() == hf_tokenizer.get_vocab()
    assert again.chat_template == hf_tokenizer.chat_template
    assert again.special_tokens_map == hf_tokenizer.special_tokens_map


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
