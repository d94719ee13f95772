"""The rows of a run: their index, buckets and schedule, and the batches made of them."""

import logging
import shlex
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from crosslmm_jax.batch import Batch
from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.batching import (
    NO_BUCKET,
    Bucket,
    Schedule,
    ScheduledBatch,
    bucket_rows,
    deal_evenly,
    group_rows,
    hold_out,
    row_cost,
)
from crosslmm_jax.data.index import RowStore, fingerprint, open_index
from crosslmm_jax.data.loading.collate import collate
from crosslmm_jax.data.loading.example import Example, ExampleLoader
from crosslmm_jax.data.text import DEFAULT_SYSTEM_PROMPT, Tokenizer, load_tokenizer
from crosslmm_jax.errors import ConfigError, Fault, UserError

_LOG = logging.getLogger(__name__)


class Dataset:
    """The rows of a `DataConfig` with their schedule. Makes batches of them.

    Attributes:
        rows: the rows, by number.
        buckets: shapes of the batches of the run.
        schedule: the rows of every step.
        loader: loads single rows.
        held_out_rows: numbers of the rows of each bucket that are not trained on.
        index_digest: hash of the index's content.
        num_without_bucket: rows that are never read, because no bucket holds them.
        padding: share of padding in an epoch's batches.
    """

    def __init__(
        self, config: DataConfig, *, tokens_per_frame: int, image_size: int,
        buckets: Sequence[Bucket] | None = None,
    ) -> None:  # fmt: skip
        """Reads index and tokenizer. Raises UserError if they are damaged or do not fit each other.

        Args:
            config: rows and settings.
            tokens_per_frame: C.
            image_size: R, pixels per side of a frame.
            buckets: shapes to use; None: they are chosen.
        """
        self.config = config
        self.tokens_per_frame = tokens_per_frame
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer)
        index = open_index(config.index)
        if fingerprint(self.tokenizer) != index.tokenizer:
            raise ConfigError(
                f"DataConfig.index {config.index} was made with a tokenizer other than {config.tokenizer};"
                f" run `crosslmm data index` again with --tokenizer {shlex.quote(config.tokenizer)}"
            )
        self.rows, self.index_digest = RowStore(index), index.digest
        self.loader = ExampleLoader(self.rows, config, tokenizer=self.tokenizer, image_size=image_size)
        more = len(self.tokenizer.encode_plain(config.system_prompt))
        more -= len(self.tokenizer.encode_plain(DEFAULT_SYSTEM_PROMPT))
        bucketed = bucket_rows(
            config, index, index.tables_of_columns, num_rows=len(index), tokens_per_frame=tokens_per_frame,
            more_system=more, buckets=buckets,
        )  # fmt: skip
        self.buckets: list[Bucket] = bucketed.buckets
        self.num_without_bucket, self.padding = bucketed.num_without_bucket, bucketed.padding
        self._kind_of_row, self._bucket_of_kind = bucketed.kind_of_row, bucketed.bucket_of_kind
        self._cost_of_kind = np.asarray(row_cost(bucketed.kinds.frames, bucketed.kinds.text))  # type: ignore[arg-type]
        if bucketed.num_without_bucket:
            _LOG.warning(
                "%d of %d rows are never read: too many tokens or frames, not of style %r, or of a modality"
                " without weight", bucketed.num_without_bucket, len(self.rows), config.style,
            )  # fmt: skip
        present = {bucket.modality for bucket in self.buckets}
        if absent := (config.modality_weights.as_dict() or {}).keys() - present:
            _LOG.warning(
                "DataConfig.modality_weights gives steps to %s, but no row is one; others get them",
                ", ".join(sorted(absent)),
            )
        weights = [Fraction(weight).limit_denominator(1000) for weight in index.weights]
        rows = group_rows(
            self._bucket_of_kind, self._kind_of_row, bucketed.dataset_of_row,
            num_buckets=len(self.buckets), weights=weights,
        )  # fmt: skip
        rows, self.held_out_rows = hold_out(rows, config.validation.share)
        self.schedule = Schedule(
            self.buckets, rows, batch_size=config.batch_size, seed=config.seed, shuffle=config.shuffle,
            modality_weights=config.modality_weights.as_dict(),
        )  # fmt: skip

    def scheduled(self, step: int) -> ScheduledBatch:
        """The rows of the global batch of `step`, in order."""
        batch = self.schedule.batch(step)
        if not self.config.shuffle:
            return batch
        order = deal_evenly(self._cost_of_kind[self._kind_of_row[batch.rows]])
        return ScheduledBatch(batch.bucket_number, batch.bucket, batch.rows[order])

    def bucket_numbers(self, numbers: Sequence[int]) -> np.ndarray:
        """int16[n], the number of the bucket of each of these rows, or NO_BUCKET."""
        return self._bucket_of_kind[self._kind_of_row[np.asarray(numbers)]]

    def batch(self, numbers: Sequence[int]) -> Batch[np.ndarray]:
        """The batch of these rows, in this order. Raises UserError if one cannot be used."""
        bucket_numbers = self.bucket_numbers(numbers)
        without = np.flatnonzero(bucket_numbers == NO_BUCKET)
        if len(without):
            row = self.rows[int(numbers[int(without[0])])]
            raise UserError(f"{row.where}: fits no bucket; raise DataConfig.text_buckets or frame_buckets")
        buckets = [self.buckets[number] for number in bucket_numbers]
        bucket = Bucket(buckets[0].modality, max(b.frames for b in buckets), max(b.text for b in buckets))
        examples = []
        for number in numbers:
            found = self.loader.load(int(number), bucket)
            if isinstance(found, Fault):
                raise UserError(str(found))
            examples.append(found)
        return self.collate(examples, bucket)

    def collate(self, examples: list[Example], bucket: Bucket) -> Batch[np.ndarray]:
        """One batch in the shape of `bucket`."""
        return collate(
            examples,
            tokens_per_frame=self.tokens_per_frame,
            image_size=self.loader.image_size,
            num_frames=bucket.frames,
            num_text=bucket.text,
            pad_id=self.tokenizer.pad,
            placeholder=self.tokenizer.video_pad,
        )
