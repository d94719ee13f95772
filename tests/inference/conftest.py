"""MODEL folders of random weights."""

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import ModelConfig, SamplingConfig
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.model import init_params
from crosslmm_jax.model_folder import save_model_folder


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """`write_model(folder)`: writes the folder `folder/model` and returns it; `folder/tokenizer` too."""

    def write(
        folder: Path, config: ModelConfig | None = None, *, seed: int = 0, system_prompt: str = "Be brief."
    ) -> Path:
        config = config or presets.tiny()
        write_default_tokenizer(folder / "tokenizer")
        save_model_folder(
            folder / "model", config=config, params=init_params(config, jax.random.key(seed)),
            tokenizer_folder=folder / "tokenizer", sampling=SamplingConfig(frames=4),
            system_prompt=system_prompt,
        )  # fmt: skip
        return folder / "model"

    return write
