"""From a MODEL folder to a model on the devices."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from crosslmm_jax.config import Precision
from crosslmm_jax.data.text import Tokenizer, load_tokenizer
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.inference.assistant import VideoModel
from crosslmm_jax.inference.devices import answering_mesh
from crosslmm_jax.inference.prepare import prepare_params
from crosslmm_jax.model import init_params, logical_axes
from crosslmm_jax.model_folder import load_model_config, load_processor, load_weights
from crosslmm_jax.parallel import param_shardings


def load(folder: str | Path, precision: Precision | None = None) -> VideoModel:
    """Loads a model onto all available devices; `answering_mesh` says how.

    Args:
      folder: a MODEL folder, or a run's folder with one in `model/`.
      precision: of the matrix products of encoder and projector, and of the video KV cache. None: as
        config.json says.

    Raises:
      UserError: a file is missing or damaged, or the weights do not fit the config.
    """
    begun, folder = time.perf_counter(), model_folder(folder)
    config, processor = load_model_config(folder), load_processor(folder)
    if precision is not None:
        config = config.at_precision(precision)
    with ThreadPoolExecutor(1) as beside:  # the tokenizer is read while the weights are
        reading = beside.submit(_read_tokenizer, folder)
        mesh = answering_mesh(config)
        shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
        shardings = param_shardings(logical_axes(config), shapes, mesh)
        # Cast to the compute dtype once here instead of at every use.
        params = load_weights(folder, config, shardings=shardings, dtype=config.compute_dtype)
        params = jax.block_until_ready(prepare_params(params, config, mesh))
        weights_s = time.perf_counter() - begun
        tokenizer, tokenizer_s = reading.result()
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but DecoderConfig.vocab_size is"
            f" {config.decoder.vocab_size}; use the tokenizer that the model was trained with"
        )
    seconds = {"weights": weights_s, "tokenizer": tokenizer_s, "load": time.perf_counter() - begun}
    return VideoModel(config, params, tokenizer, processor, mesh, seconds)


def model_folder(folder: str | Path) -> Path:
    """`folder`, or the MODEL folder in it if it is a run's."""
    folder = Path(folder)
    if not (folder / "config.json").exists() and (folder / "model" / "config.json").exists():
        return folder / "model"
    return folder


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, float]:
    begun = time.perf_counter()
    return load_tokenizer(folder), time.perf_counter() - begun
