"""Reads held-out rows as batches of the run's shapes, a batch ahead of the one that is used."""

import dataclasses
import logging
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from crosslmm_jax.batch import Batch
from crosslmm_jax.config import ModalityWeights, ValidationConfig
from crosslmm_jax.data.batching import ScheduledBatch, held_out_batches
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.example import Example
from crosslmm_jax.data.media import import_readers
from crosslmm_jax.data.text import TokenSequence
from crosslmm_jax.errors import ConfigError, Fault, UserError

_LOG = logging.getLogger(__name__)


class HeldOutRows:
    """The rows of `DataConfig.validation`. Their global batches are the same on any number of hosts.

    Attributes:
        num_rows: rows that are read each time.
        digest: tells two sets of rows apart.
    """

    def __init__(self, dataset: Dataset, batches: Sequence[ScheduledBatch]) -> None:
        """Reads `batches` of `dataset`."""
        self._dataset, self._batches = dataset, list(batches)
        self._known_bad: set[int] = set()
        self.num_rows = sum(len(batch.rows) for batch in batches)
        content = b"".join(batch.rows.astype("<i8").tobytes() for batch in batches)
        self.digest = f"{dataset.index_digest}/{zlib.crc32(content):08x}"

    def batches(self, *, shard_index: int = 0, shard_count: int = 1) -> Iterator[Batch[np.ndarray]]:
        """The batches of one host. A row without targets stands for one that cannot be used, or is lacking.

        Args:
            shard_index: number of this host.
            shard_count: number of hosts that share a global batch.
        """
        size = self._dataset.config.batch_size // shard_count
        part = slice(shard_index * size, (shard_index + 1) * size)
        import_readers()  # before any thread reads
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="read-held-out") as threads:
            waiting: deque[list[Future[Example | Fault]]] = deque()

            def start(batch: ScheduledBatch) -> None:
                load = self._dataset.loader.load
                rows = batch.rows[part].tolist()
                waiting.append([threads.submit(load, row, batch.bucket) for row in rows])

            try:
                for batch, following in zip(self._batches, [*self._batches[1:], None], strict=True):
                    if not waiting:
                        start(batch)
                    if following is not None:
                        start(following)
                    found = [self._usable(future.result()) for future in waiting.popleft()]
                    blanks = [self._blank()] * (size - len(found))
                    yield self._dataset.collate([*found, *blanks], batch.bucket)
            finally:
                for future in (future for batch in waiting for future in batch):
                    future.cancel()

    def _usable(self, found: Example | Fault) -> Example:
        if isinstance(found, Example):
            return found
        if found.row not in self._known_bad:
            self._known_bad.add(found.row)
            _LOG.warning("validation: row %d is left out (%s): %s", found.row, found.reason, found)
        return self._blank()

    def _blank(self) -> Example:
        """A row of a single token without target."""
        return Example(
            TokenSequence.of_text([self._dataset.tokenizer.pad]), (), row_index=-1, where="padding"
        )


def open_held_out(dataset: Dataset) -> HeldOutRows | None:
    """The held-out rows that the config of `dataset` names, in its shapes; None if it names none.

    Raises:
        UserError: there are none, or their index cannot be used.
    """
    config, rows = dataset.config, dataset.held_out_rows
    validation = config.validation
    if not validation.enabled:
        return None
    if validation.index is not None:
        other = dataclasses.replace(
            config, index=validation.index, validation=ValidationConfig(), modality_weights=ModalityWeights(),
            frame_cache_mb=0,
        )  # fmt: skip
        tokens_per_frame, image_size = dataset.tokens_per_frame, dataset.loader.image_size
        try:
            dataset = Dataset(
                other, tokens_per_frame=tokens_per_frame, image_size=image_size, buckets=dataset.buckets
            )
        except UserError as error:
            raise ConfigError(f"DataConfig.validation.index: {error}") from error
        rows = [np.concatenate([part.rows for part in parts]) for parts in dataset.schedule.rows]
    batches = held_out_batches(dataset.buckets, rows, batch_size=config.batch_size, most_rows=validation.rows)
    if not batches:
        raise ConfigError(
            f"DataConfig.validation.share is {validation.share}, by which no row of {config.index} is held"
            " out; raise it, or name other rows with validation.index"
        )
    return HeldOutRows(dataset, batches)
