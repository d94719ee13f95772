"""The default tokenizer and a small synthetic set, made once for all tests of this room."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lookalikes import write_lookalikes

from crosslmm_jax.data.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import TokenizersBackend

QWEN = Path(__file__).resolve().parents[3] / "shared" / "tokenizer" / "qwen2.5"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session", params=["default", "qwen"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The default tokenizer, and the real one of Qwen2.5 where it is available."""
    if request.param == "default":
        return request.getfixturevalue("tokenizer")
    if not QWEN.is_dir():
        pytest.skip("the real vocabulary is not here")
    return load_tokenizer(QWEN)


@pytest.fixture(scope="session")
def hf_tokenizer(any_tokenizer: Tokenizer) -> "TokenizersBackend":
    """The same tokenizer, read by transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(any_tokenizer.folder, local_files_only=True, fix_mistral_regex=False)


@pytest.fixture(scope="session")
def lookalikes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of look-alike files in every format, with `mixture.yaml`. Read only."""
    folder = tmp_path_factory.mktemp("lookalikes")
    write_lookalikes(folder)
    return folder
