"""What a run says about the MODEL folder that it starts from."""

import dataclasses
from pathlib import Path

import pytest

from crosslmm_jax.config import ModelConfig, SamplingConfig
from crosslmm_jax.config_io import apply_overrides
from crosslmm_jax.model_folder import make_processor, write_settings
from crosslmm_jax.presets import tiny
from crosslmm_jax.train.initial import warn_of_other_positions


def model_folder(folder: Path, config: ModelConfig) -> Path:
    """A MODEL folder whose weights and tokenizer nobody reads."""
    folder.mkdir()
    write_settings(folder, config, make_processor(config, sampling=SamplingConfig(), system_prompt=""))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    return folder


def test_another_yarn_than_that_of_the_weights_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tiny()
    decoder = plain.decoder.with_positions(2 * plain.decoder.max_positions)
    scaled = dataclasses.replace(plain, decoder=decoder)
    folder = model_folder(tmp_path / "scaled", scaled)
    warn_of_other_positions(model_folder(tmp_path / "plain", plain), scaled)  # a run may add YaRN
    warn_of_other_positions(folder, scaled)
    assert caplog.messages == []
    warn_of_other_positions(folder, plain)
    (message,) = caplog.messages
    assert f"{folder / 'config.json'}: decoder has yarn_factor 2 of {plain.decoder.max_positions}" in message
    options = [word.rstrip(",") for word in message.split() if word.startswith("--model.")]
    values = ["2", str(plain.decoder.max_positions)]
    words = [word.replace("--model.", "--") for pair in zip(options, values, strict=True) for word in pair]
    words += ["--decoder.max-positions", str(decoder.max_positions)]
    warn_of_other_positions(folder, apply_overrides(plain, words, source="test"))
    assert len(caplog.messages) == 1, "what the message names is the fix"
