"""The input pipeline on grain: rows, shuffled and repeated, to the batches of this host.

The global batch that starts at row position k is a function of k, the seed and the annotations alone. A host
takes a contiguous part of it, so the batch put together from all hosts is the same for any number of hosts
and of worker processes. The whole position is one integer, `global_next_index`: the next row position.

grain's own ElasticIterator keeps the same state, but it stacks examples of equal shape and deals the rows of
a batch out one by one; here batches are collated to buckets inside the workers.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import Row, read_annotations
from crosslmm_jax.data.collate import Batch, Example, collate
from crosslmm_jax.data.loader import BadRow, ExampleLoader
from crosslmm_jax.data.tokenizer import Tokenizer, load_tokenizer
from crosslmm_jax.errors import ConfigError, UserError

_LOG = logging.getLogger(__name__)
_STATE_KEY = "global_next_index"


class Source:
    """The rows of a `DataConfig`, read and checked once, and what turns them into batches."""

    def __init__(self, config: DataConfig, *, tokens_per_frame: int, image_size: int) -> None:
        """Reads annotations and tokenizer. Raises UserError naming what is wrong with them."""
        self.config = config
        self.tokens_per_frame = tokens_per_frame
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer)
        self.rows: list[Row] = read_annotations(config.annotations, config.media_root)
        self.loader = ExampleLoader(self.rows, config, tokenizer=self.tokenizer, image_size=image_size)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The batch of these rows, in their order. Raises UserError where one is unreadable."""
        examples = []
        for number in numbers:
            example, bad = self.loader(number)
            if bad:
                raise UserError(bad[0].reason)
            examples.append(example)
        return self.collate(examples)

    def collate(self, examples: list[Example]) -> Batch:
        """One batch of static shape; see `crosslmm_jax.data.collate.collate`."""
        return collate(
            examples,
            tokens_per_frame=self.tokens_per_frame,
            image_size=self.loader.image_size,
            frame_buckets=self.config.frame_buckets or (self.config.sampling.frames,),
            text_buckets=self.config.text_buckets,
            pad_id=self.tokenizer.pad,
            placeholder=self.tokenizer.video_pad,
        )


def make_dataset(source: Source) -> Any:
    """A `grain.MapDataset` of row numbers: shuffled anew in each epoch, repeated without end."""
    import grain

    dataset = grain.MapDataset.range(len(source.rows)).seed(source.config.seed)
    if source.config.shuffle:
        dataset = dataset.shuffle()
    return dataset.repeat()


class _BatchLoader:
    """Batch number to batch, in whichever process grain runs it."""

    def __init__(self, source: Source, order: Any, *, start: int, shard_index: int, shard_count: int) -> None:
        self.source = source
        self.order = order
        self.host_batch = source.config.batch_size // shard_count
        self.first = start + shard_index * self.host_batch

    def __call__(self, number: int) -> dict[str, Any]:
        """Errors of the user's making travel as text, since grain rewrites exceptions between processes."""
        begin = self.first + number * self.source.config.batch_size
        bad: list[tuple[int, str]] = []
        try:
            examples = []
            for position in range(begin, begin + self.host_batch):
                example, failed = self.source.loader(int(self.order[position]))
                examples.append(example)
                bad += [(row.row_index, row.reason) for row in failed]
            return {"batch": self.source.collate(examples), "bad": bad, "error": ""}
        except UserError as error:
            return {"batch": {}, "bad": bad, "error": str(error)}


class BatchIterator(Iterator[Batch]):
    """Batches of this host, without end.

    Attributes:
        bad_rows: row number -> why its media could not be read, of all batches handed out so far.
    """

    def __init__(
        self,
        source: Source,
        *,
        global_next_index: int = 0,
        shard_index: int = 0,
        shard_count: int = 1,
        on_bad_row: Callable[[BadRow], None] | None = None,
    ) -> None:
        """See `make_iterator`."""
        self.source = source
        self.bad_rows: dict[int, str] = {}
        self._next_index = global_next_index
        self._shard = (shard_index, shard_count)
        self._on_bad_row = on_bad_row or _log_bad_row
        self._order = make_dataset(source)
        self._iterator: Any = None

    def __next__(self) -> Batch:
        """The next batch. Raises UserError when a row cannot be used."""
        if self._iterator is None:
            self._iterator = self._start()
        result = next(self._iterator)
        for row_index, reason in result["bad"]:
            row_index = int(row_index)
            if row_index not in self.bad_rows:
                self.bad_rows[row_index] = reason
                self._on_bad_row(BadRow(row_index, reason))
        if result["error"]:
            raise UserError(result["error"])
        self._next_index += self.source.config.batch_size
        return result["batch"]

    def _start(self) -> Any:
        import grain

        config = self.source.config
        shard_index, shard_count = self._shard
        load = _BatchLoader(
            self.source, self._order, start=self._next_index, shard_index=shard_index, shard_count=shard_count
        )
        batches = grain.MapDataset.range(sys.maxsize // config.batch_size).map(load)
        read = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
        dataset = batches.to_iter_dataset(read)
        if config.num_workers:
            _parse_absl_flags()
            ahead = max(1, config.prefetch // config.num_workers)
            options = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=ahead)
            dataset = dataset.mp_prefetch(options)
        return iter(dataset)

    def get_state(self) -> dict[str, int]:
        """The position after the last batch handed out; the same on every host."""
        return {_STATE_KEY: self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position from `get_state`, of any number of hosts and workers."""
        self.close()
        self._next_index = int(state[_STATE_KEY])

    def close(self) -> None:
        """Ends worker processes and threads; a later `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _log_bad_row(row: BadRow) -> None:
    _LOG.warning("another row takes the place of row %d: %s", row.row_index, row.reason)


def _parse_absl_flags() -> None:
    """grain reads an absl flag in worker processes, which fails unless flags count as parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def make_iterator(
    source: Source,
    *,
    global_next_index: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    on_bad_row: Callable[[BadRow], None] | None = None,
) -> BatchIterator:
    """Batches of one host from row position `global_next_index` on.

    Args:
        source: rows and settings.
        global_next_index: position to start at, a value of `BatchIterator.get_state`.
        shard_index: which of the hosts this is.
        shard_count: how many hosts share a global batch.
        on_bad_row: called once for each row whose media cannot be read; by default a warning is logged.

    Raises:
        ConfigError: the batch does not divide among hosts, or several hosts could pick different buckets.
    """
    config = source.config
    if config.batch_size % shard_count:
        raise ConfigError(
            f"DataConfig.batch_size is {config.batch_size}; it must be a multiple of the {shard_count} hosts"
        )
    for name in ("frame_buckets", "text_buckets"):
        # Each host sees its own rows only and would pick its own bucket, but a global array has one shape.
        if shard_count > 1 and len(getattr(config, name)) > 1:
            raise ConfigError(
                f"DataConfig.{name} is {getattr(config, name)}; with several hosts it must hold one size"
            )
    return BatchIterator(
        source, global_next_index=global_next_index, shard_index=shard_index, shard_count=shard_count,
        on_bad_row=on_bad_row,
    )  # fmt: skip
