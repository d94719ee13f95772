"""Saves a model as a MODEL folder."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from crosslmm_jax.config import ModelConfig, SamplingConfig, TimeInstruction
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder.contents import (
    check_replaceable,
    copy_tokenizer,
    find_model_folder,
    is_model_folder,
)
from crosslmm_jax.model_folder.settings import (
    Processor,
    Resampling,
    load_processor,
    make_processor,
    write_settings,
)
from crosslmm_jax.model_folder.weights import write_weights
from crosslmm_jax.parallel import is_first_process
from crosslmm_jax.utils import atomic_folder

logger = logging.getLogger(__name__)


def save_model_folder(
    folder: str | Path,
    *,
    config: ModelConfig,
    params: Mapping[str, Any],
    tokenizer_folder: str | Path,
    sampling: SamplingConfig,
    system_prompt: str,
    time_instruction: TimeInstruction = "none",
    resampling: Resampling = "bicubic",
    started_from: str | Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Writes a MODEL folder. It appears, and replaces an older one, only when it is complete.

    Every process of a run calls this; process 0 writes.

    Args:
      folder: where to write it.
      config: the model configuration.
      params: the parameters, possibly sharded.
      tokenizer_folder: its tokenizer files are copied.
      sampling: which frames of a video the model was trained on.
      system_prompt: the system prompt of training.
      time_instruction: what training prompts said about the times of a video.
      resampling: how frames were resized.
      started_from: the MODEL folder that training started from, whose end tokens and sampling are kept.
      dtype: of the weights in the files.

    Raises:
      UserError: `folder` holds something other than a MODEL folder or cannot be written, or
        `tokenizer_folder` has no tokenizer.
    """
    folder = Path(folder)
    check_replaceable(folder)
    processor = make_processor(
        config, sampling=sampling, system_prompt=system_prompt, time_instruction=time_instruction,
        resampling=resampling,
    )  # fmt: skip
    writes = is_first_process()
    if writes and started_from is not None:
        processor = _answering_as(processor, started_from)
    with atomic_folder(folder, resume=False) if writes else contextlib.nullcontext(folder) as building:
        if writes:
            write_settings(building, config, processor)
            copy_tokenizer(tokenizer_folder, building)
        write_weights(building, params, dtype=dtype)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"saved {folder}")


def _answering_as(processor: Processor, started_from: str | Path) -> Processor:
    """`processor` with the end tokens and the sampling of the MODEL folder `started_from`."""
    with contextlib.suppress(UserError):
        started_from = find_model_folder(started_from)
    if not is_model_folder(started_from):  # training may have gone on for days since it was read
        logger.warning("%s is gone: answers of the new MODEL folder have the usual end tokens", started_from)
        return processor
    first = load_processor(started_from)
    return dataclasses.replace(processor, end_tokens=first.end_tokens, generation=first.generation)
