"""Which questions a model answers exactly."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from crosslmm_jax.batch import Batch, needed
from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.loading import Dataset
from crosslmm_jax.model import CrossLMM
from crosslmm_jax.model_folder import load_model_config, load_weights


def answered_exactly(model_folder: str | Path, data: DataConfig) -> Bool[np.ndarray, " rows"]:
    """Whether greedy decoding gives exactly the answers of each row.

    Greedy decoding gives an answer if and only if each of its tokens is the most probable one after those
    before it. So one forward pass over question and answer is enough.

    Args:
      model_folder: the model.
      data: the rows, in order, in batches of `data.batch_size`.
    """
    config = load_model_config(model_folder)
    params = load_weights(model_folder, config, dtype=config.compute_dtype)
    dataset = Dataset(
        data, tokens_per_frame=config.merge.tokens_per_frame, image_size=config.vision.image_size
    )
    model, vocab_size = CrossLMM(config), dataset.tokenizer.vocab_size

    @jax.jit
    def exact(params: PyTree[Array], batch: Batch[Array]) -> Bool[Array, " b"]:
        logits = model.apply({"params": params}, batch)
        most_probable = jnp.argmax(logits[:, :-1, :vocab_size], axis=-1)  # type: ignore[index]
        is_target = needed(batch.loss_mask, "loss_mask")[:, 1:] > 0
        return jnp.all((most_probable == batch.tokens[:, 1:]) | ~is_target, axis=1)

    results = []
    for begin in range(0, len(dataset.rows), data.batch_size):
        rows = range(begin, min(begin + data.batch_size, len(dataset.rows)))
        # Copies of its first row fill the last batch, so that all batches have one static shape.
        filled = [*rows, *[begin] * (data.batch_size - len(rows))]
        results.append(np.asarray(exact(params, dataset.batch(filled)))[: len(rows)])
    return np.concatenate(results)
