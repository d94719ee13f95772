"""How many questions a model answers exactly."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from crosslmm_jax.batch import Batch, needed
from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.loading import Dataset
from crosslmm_jax.model import CrossLMM
from crosslmm_jax.model_folder import load_model_config, load_weights


def answered_exactly(model_folder: str | Path, data: DataConfig) -> Bool[np.ndarray, " rows"]:
    """For each row of `data`, whether greedy decoding writes its answers and then stops.

    Greedy decoding puts out the right tokens if and only if each of them, given the ones before it, is the
    most probable: one pass over question and answer tells.

    Args:
      model_folder: of the model.
      data: rows in order; `batch_size` of them go through the model at once.
    """
    config = load_model_config(model_folder)
    params = load_weights(model_folder, config, dtype=config.compute_dtype)
    dataset = Dataset(
        data, tokens_per_frame=config.merge.tokens_per_frame, image_size=config.vision.image_size
    )
    model, vocab_size = CrossLMM(config), dataset.tokenizer.vocab_size

    @jax.jit
    def right(params: Any, batch: Batch[Array]) -> Bool[Array, " b"]:
        logits = model.apply({"params": params}, batch)
        likeliest = jnp.argmax(logits[:, :-1, :vocab_size], axis=-1)  # type: ignore[index]
        is_target = needed(batch.loss_mask, "loss_mask")[:, 1:] > 0
        return jnp.all((likeliest == batch.tokens[:, 1:]) | ~is_target, axis=1)

    results = []
    for begin in range(0, len(dataset.rows), data.batch_size):
        numbers = range(begin, min(begin + data.batch_size, len(dataset.rows)))
        # One static shape: the last batch is filled up with its first row.
        filled = [*numbers, *[begin] * (data.batch_size - len(numbers))]
        results.append(np.asarray(right(params, dataset.batch(filled)))[: len(numbers)])
    return np.concatenate(results)
