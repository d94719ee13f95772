"""Tokens, frames and model FLOPs of a batch."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from crosslmm_jax.batch import Batch, needed
from crosslmm_jax.config import ModelConfig, StageConfig
from crosslmm_jax.model import flops
from crosslmm_jax.train.stages import adapter_sizes, model_of_stage, trained_shares


class Work(NamedTuple):
    """What one or several batches hold."""

    tokens: int = 0  # T of all rows of the global batch, padding included
    frames: int = 0  # F of all rows of the global batch, padding included
    flops: float = 0.0  # model FLOPs of this process's rows, padding excluded


def total_work(works: Iterable[Work]) -> Work:
    """The work of several batches."""
    tokens, frames, model_flops = zip(*works, strict=True)
    return Work(sum(tokens), sum(frames), sum(model_flops))


class WorkCounter:
    """Counts the work of batches of one stage."""

    def __init__(self, model: ModelConfig, stage: StageConfig, *, num_shards: int) -> None:
        """`num_shards`: parts of a global batch, of which a process has one."""
        self._config, self._learns = model_of_stage(model, stage), trained_shares(model, stage)
        self._adapters = adapter_sizes(model, stage)
        self._num_shards = num_shards
        self._flops_of_row = functools.lru_cache(2**16)(self._count_row)

    def count(self, batch: Batch[np.ndarray]) -> Work:
        """The work of a step on this process's `batch`."""
        frames = needed(batch.frames, "frames").shape
        seen = batch.visible_frames.counts > 0
        targets = needed(batch.loss_mask, "loss_mask") > 0
        length = batch.tokens.shape[1]
        # A row ends with its last target. Text before the first frame reads no frame.
        ends = np.where(targets.any(1), length - targets[:, ::-1].argmax(1), 0)
        before = np.where(seen.any(1), seen.argmax(1), ends)
        rows = zip(
            batch.visible_frames.counts.max(1).tolist(), ends.tolist(), before.tolist(),
            targets.sum(1).tolist(), strict=True,
        )  # fmt: skip
        return Work(
            tokens=batch.tokens.size * self._num_shards,
            frames=frames[0] * frames[1] * self._num_shards,
            flops=sum(self._flops_of_row(*row) for row in rows),
        )

    def _count_row(self, frames: int, end: int, before: int, targets: int) -> float:
        text = max(end - frames * self._config.merge.tokens_per_frame, 0)
        work = flops.Workload(frames=frames, text=text, before=min(before, text))
        costs = flops.train(self._config, work, targets=targets, learns=self._learns, adapters=self._adapters)
        return flops.total(costs)
