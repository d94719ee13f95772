"""From a MODEL folder to a model on the devices."""

import dataclasses
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.sharding import Mesh

from crosslmm_jax.config import MeshConfig, ModelConfig, Precision
from crosslmm_jax.config_io import to_dict
from crosslmm_jax.data.text import Tokenizer, load_tokenizer
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.inference.assistant import VideoModel, usual_text
from crosslmm_jax.inference.compiled import Compiled
from crosslmm_jax.inference.devices import answering_mesh
from crosslmm_jax.inference.prepare import prepare_params, prepared_shapes
from crosslmm_jax.inference.shapes import frames_at_once, prompt_shape
from crosslmm_jax.inference.watching import RESERVED_POSITIONS
from crosslmm_jax.model import init_params, logical_axes
from crosslmm_jax.model_folder import (
    Processor,
    find_model_folder,
    load_model_config,
    load_processor,
    load_weights,
)
from crosslmm_jax.parallel import param_shardings, together

logger = logging.getLogger(__name__)
DOCUMENTED_YARN_FACTOR = 4.0  # the largest in Qwen2.5's documentation


def load(
    folder: str | Path,
    precision: Precision | None = None,
    *,
    mesh: MeshConfig | None = None,
    frames: Callable[[], int] | None = None,
    yarn_frames: int = 0,
) -> VideoModel:
    """Loads a model onto all available devices.

    With several processes (`parallel.initialize_processes`), these are the devices of all of them. Every
    process then calls the same functions with the same arguments in the same order, and gets the same
    answers; each reads the files itself. What fails on one of them fails on all.

    Args:
      folder: a MODEL folder, or a run's folder with one in `model/`.
      precision: of the matrix products of encoder and projector, and of the video KV cache. None: as
        config.json says.
      mesh: how the devices share the work: `tensor` of them share the weights, and `data` groups divide the
        videos; -1 in one of them stands for all that remain. None: as `answering_mesh` chooses.
      frames: returns the number of frames of the first video once it is known. Its programs are then compiled
        or read from disk while the weights are read.
      yarn_frames: the decoder gets positions for so many frames, if it has fewer: by YaRN, with the smallest
        whole factor. All answers are then those of the scaled positions.

    Raises:
      UserError: a file is missing or damaged, the weights do not fit the config, the mesh does not fit the
        devices, or the model of another process has another config.
    """
    begun, folder = time.perf_counter(), find_model_folder(folder)
    config, processor = together(
        lambda: (load_model_config(folder), load_processor(folder)),
        same=lambda settings: [to_dict(part) for part in settings],
        what=f"the settings in {folder}",
    )
    if precision is not None:
        config = config.at_precision(precision)
    with ThreadPoolExecutor(2) as beside:  # tokenizer and programs are read while the weights are
        reading, preparing = beside.submit(_read_tokenizer, folder), None
        devices = answering_mesh(config, mesh)
        if frames is not None and devices.size == 1:  # the layout of several is known only by compiling
            count = frames

            def prepare() -> float:
                tokenizer = reading.result()[0]
                scaled = with_positions_for(yarn_frames, config, processor, tokenizer)
                return prepare_programs(scaled, devices, tokenizer, processor, count())

            preparing = beside.submit(prepare)
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        shardings = param_shardings(logical_axes(config), shapes, devices)
        # Cast to the compute dtype once here instead of at every use.
        params = together(
            lambda: load_weights(folder, config, shardings=shardings, dtype=config.compute_dtype)
        )
        params = jax.block_until_ready(prepare_params(params, config, devices))
        seconds = {"weights": time.perf_counter() - begun}
        tokenizer, seconds["tokenizer"] = together(reading.result)
        if preparing is not None:
            seconds["programs"] = preparing.result()
    if tokenizer.vocab_size > config.decoder.vocab_size:
        raise ConfigError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but DecoderConfig.vocab_size is"
            f" {config.decoder.vocab_size}; use the tokenizer that the model was trained with"
        )
    config = with_positions_for(yarn_frames, config, processor, tokenizer)
    if config.decoder.yarn_factor > DOCUMENTED_YARN_FACTOR:
        logger.warning(
            "positions are scaled by %g (YaRN); Qwen2.5 documents factors up to %g only",
            config.decoder.yarn_factor, DOCUMENTED_YARN_FACTOR,
        )  # fmt: skip
    seconds["load"] = time.perf_counter() - begun
    return VideoModel(config, params, tokenizer, processor, devices, seconds)


def with_positions_for(
    frames: int, config: ModelConfig, processor: Processor, tokenizer: Tokenizer
) -> ModelConfig:
    """`config` with positions for so many frames and the text about them, by YaRN where it has fewer."""
    tokens = frames * config.merge.tokens_per_frame + usual_text(frames, tokenizer, processor)
    decoder = config.decoder.with_positions(tokens + RESERVED_POSITIONS) if frames else config.decoder
    return dataclasses.replace(config, decoder=decoder)


def prepare_programs(
    config: ModelConfig, mesh: Mesh, tokenizer: Tokenizer, processor: Processor, num_frames: int
) -> float:
    """Compiles, or reads from disk, the programs for a video of so many frames; returns the seconds."""
    begun = time.perf_counter()
    shape = prompt_shape(
        num_frames, 0, tokens_per_frame=processor.tokens_per_frame,
        usual_text=usual_text(num_frames, tokenizer, processor),
    )  # fmt: skip
    Compiled(config, mesh).prepare(
        prepared_shapes(config), shape, frames_at_once=frames_at_once(num_frames),
        image_size=processor.image_size, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    return time.perf_counter() - begun


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, float]:
    begun = time.perf_counter()
    return load_tokenizer(folder), time.perf_counter() - begun
