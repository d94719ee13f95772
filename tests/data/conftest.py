"""The default tokenizer and a small synthetic set, made once for all tests of this room."""

from pathlib import Path

import pytest
from lookalikes import write_lookalikes

from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.text.tokenizer import Tokenizer, load_tokenizer, write_default_tokenizer
from crosslmm_jax.demo.synthetic import SyntheticSet, write_dataset

QWEN = Path(__file__).resolve().parents[3] / "shared" / "tokenizer" / "qwen2.5"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_default_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session", params=["default", "qwen"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """The default tokenizer, and the real one of Qwen2.5 where it is at hand."""
    if request.param == "default":
        return request.getfixturevalue("tokenizer")
    if not QWEN.is_dir():
        pytest.skip("the Qwen2.5 tokenizer is not here")
    return load_tokenizer(QWEN)


@pytest.fixture(scope="session")
def lookalikes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of look-alike files in every format, to be read only, and `mixture.yaml` over them."""
    folder = tmp_path_factory.mktemp("lookalikes")
    write_lookalikes(folder)
    return folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", num_train=16, num_heldout=8, seed=3)


@pytest.fixture(scope="session")
def make_index(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path):
    """`make_index(annotations)`: the folder of a new index of them, made in this process."""

    def make(annotations: Path | str, **options) -> Path:
        out = tmp_path_factory.mktemp("index") / "index"
        build_index(str(annotations), out, tokenizer=str(tokenizer_folder), quiet=True, **options)
        return out

    return make
