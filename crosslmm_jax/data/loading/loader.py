"""The input pipeline on grain: from steps of the schedule to the batches of this host.

The global batch of a step is, for one config, a function of (index, seed, step). Each host takes a contiguous
part of it, so the global batch is the same for any number of hosts and worker processes. The position is one
integer, `global_next_index`: the rows read so far, B per step.

grain's ElasticIterator has the same state, but stacks examples of equal shape and distributes the rows of a
batch one by one. Here workers collate batches to buckets, and grain passes the arrays in shared memory.

A worker makes a batch alone, and its start takes seconds. So this process makes the first batch, with a
thread for each core, and the read-ahead begins behind it.
"""

import functools
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from crosslmm_jax.batch import Batch
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.example import Example
from crosslmm_jax.data.media import import_readers
from crosslmm_jax.errors import ConfigError, Fault, UserError, list_counts
from crosslmm_jax.utils import work_for_parent

if TYPE_CHECKING:
    from grain import DatasetIterator

_LOG = logging.getLogger(__name__)
_STATE_KEY = "global_next_index"
_MIN_SEEN = 200  # rows to read before the share of bad rows can stop a run
_LISTED = 10  # bad rows in the error message
_RESTARTS = 3  # restarts of dead workers without a batch in between


class _HostBatch(TypedDict):
    """What a worker returns. Errors travel as text, because grain changes exceptions between processes."""

    batch: Batch[np.ndarray] | None  # None after an error
    faults: list[Fault]
    dropped_turns: list[int]  # of each truncated row
    error: str


class _BatchLoader:
    """Loads batches by number, in the process where it is called, which may be from several threads.

    All calls share `num_threads` threads, which read rows in the order in which their batches were asked
    for: a batch that is needed sooner is not slowed down by those after it.
    """

    def __init__(
        self, dataset: Dataset, *, start: int, shard_index: int, shard_count: int, num_threads: int
    ) -> None:
        self.dataset = dataset
        self.start = start
        self.num_threads = num_threads
        host_batch = dataset.config.batch_size // shard_count
        self.part = slice(shard_index * host_batch, (shard_index + 1) * host_batch)
        self._get_ready()

    def _get_ready(self) -> None:
        import_readers()  # before any thread reads
        self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="read-rows")

    def __getstate__(self) -> dict[str, object]:
        """Without the threads: a copy in another process has its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_threads"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Runs in a worker process, which grain would leave running after the training is killed."""
        self.__dict__.update(state)
        work_for_parent()
        self._get_ready()

    def __call__(self, number: int) -> _HostBatch:
        faults: list[Fault] = []
        waiting: list[Future[tuple[Example, list[Fault]]]] = []
        try:
            scheduled, schedule = self.dataset.scheduled(self.start + number), self.dataset.schedule
            for row in scheduled.rows[self.part].tolist():
                replacement = functools.partial(schedule.replacement, scheduled.bucket_number, row)
                load = self.dataset.loader.load_or_replace
                waiting.append(self._threads.submit(load, row, scheduled.bucket, replacement))
            examples = []
            for loaded in waiting:
                example, failed = loaded.result()
                examples.append(example)
                faults += failed
            dropped = [count for one in examples if (count := one.sequence.dropped_turns)]
            batch = self.dataset.collate(examples, scheduled.bucket)
            return _HostBatch(batch=batch, faults=faults, dropped_turns=dropped, error="")
        except UserError as error:
            return _HostBatch(batch=None, faults=faults, dropped_turns=[], error=str(error))
        finally:
            for loaded in waiting:
                loaded.cancel()  # after an error: nobody asks for the rows behind it


class BatchIterator(Iterator[Batch[np.ndarray]]):
    """An endless iterator over the batches of this host.

    Attributes:
        bad_rows: row number -> why the row cannot be used, over all batches so far.
        faults: reason -> number of replaced rows.
        truncated: "rows" that were too long, and the "turns" that they lost.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_next_index: int = 0,
        shard_index: int = 0,
        shard_count: int = 1,
        on_bad_row: Callable[[Fault], None] | None = None,
    ) -> None:
        """Starts at row `global_next_index`; nothing is read before the first `next`.

        Args:
            dataset: rows and settings.
            global_next_index: the start position, a value of `get_state`.
            shard_index: number of this host.
            shard_count: number of hosts that share a global batch.
            on_bad_row: called once per row that cannot be used; by default logs a warning.

        Raises:
            ConfigError: the batch does not divide among the hosts, or no batch begins at the position.
        """
        if dataset.config.batch_size % shard_count:
            raise ConfigError(
                f"DataConfig.batch_size is {dataset.config.batch_size}; it must be a multiple of the"
                f" {shard_count} hosts"
            )
        self.dataset = dataset
        self.bad_rows: dict[int, str] = {}
        self._new_bad_rows: list[Fault] = []
        self.faults: Counter[str] = Counter()
        self.truncated = Counter(rows=0, turns=0)
        self._reported = self.faults.copy(), self.truncated.copy()
        self._seen = 0
        self._shard = (shard_index, shard_count)
        self._on_bad_row = on_bad_row or _log_bad_row
        self._iterator: DatasetIterator[_HostBatch] | None = None
        self._step = 0
        self.set_state({_STATE_KEY: global_next_index})

    def __next__(self) -> Batch[np.ndarray]:
        """The next batch. Raises UserError if too many rows cannot be used, or workers keep dying."""
        result = self._next_result()
        self._seen += self.dataset.config.batch_size // self._shard[1]
        for fault in result["faults"]:
            self.faults[fault.reason] += 1
            if fault.row not in self.bad_rows:
                self.bad_rows[fault.row] = str(fault)
                self._new_bad_rows.append(fault)
                self._on_bad_row(fault)
        dropped = [int(turns) for turns in result["dropped_turns"]]
        self.truncated.update(rows=len(dropped), turns=sum(dropped))
        if result["batch"] is None:
            raise UserError(result["error"])
        self._check_share()
        self._step += 1
        return result["batch"]

    def _next_result(self) -> _HostBatch:
        for attempt in range(_RESTARTS + 1):
            if self._iterator is None and not attempt:
                return self._make_first()
            if self._iterator is None:  # not here: what killed a worker would kill this process
                self._iterator = self._read_ahead(self._step)
            try:
                return next(self._iterator)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                self.close()
                _LOG.warning("a worker process died at step %d; started again (%d)", self._step, attempt + 1)
        raise UserError(
            f"worker processes died {_RESTARTS + 1} times in a row at step {self._step}, perhaps out of"
            " memory; lower DataConfig.num_workers or prefetch"
        )

    def _check_share(self) -> None:
        """Stops the run when too many rows are bad."""
        count, limit = sum(self.faults.values()), self.dataset.config.max_bad_fraction
        if self._seen < _MIN_SEEN or count <= limit * self._seen:
            return
        reasons = ", ".join(list_counts(self.faults))
        named = "; ".join(list(self.bad_rows.values())[:_LISTED])
        raise UserError(
            f"{count} of {self._seen} rows could not be read ({reasons}), more than"
            f" DataConfig.max_bad_fraction {limit}; repair the files, or raise it to"
            f" {math.ceil(100 * count / self._seen) / 100} or more, which a run that resumes takes with"
            f" --run.accept-changes. First: {named}"
        )

    def _make_first(self) -> _HostBatch:
        """Makes the batch of the current step here, with all cores; then starts to read those after it."""
        result = self._batch_loader(self._step, num_threads=os.cpu_count() or 1)(0)
        if result["batch"] is not None:
            self._iterator = self._read_ahead(self._step + 1)
        return result

    def _batch_loader(self, step: int, *, num_threads: int) -> _BatchLoader:
        """Its batch 0 is that of `step`."""
        index, count = self._shard
        return _BatchLoader(
            self.dataset, start=step, shard_index=index, shard_count=count, num_threads=num_threads
        )

    def _read_ahead(self, step: int) -> "DatasetIterator[_HostBatch]":
        """Starts reading at `step`, in worker processes if the config asks for them; waits for nothing."""
        import grain

        config = self.dataset.config
        ahead = max(1, config.prefetch // max(1, config.num_workers))  # batches per process
        load = self._batch_loader(step, num_threads=config.num_threads)
        batches = grain.MapDataset.range(sys.maxsize // config.batch_size).map(load)
        read = grain.ReadOptions(
            num_threads=config.num_threads, prefetch_buffer_size=max(ahead, config.num_threads)
        )
        stream = batches.to_iter_dataset(read)
        if config.num_workers:
            _parse_absl_flags()
            options = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=ahead)
            stream = stream.mp_prefetch(options)
        iterator = iter(stream)
        iterator.get_state()  # makes grain's iterator of each worker, or start_prefetch would find none
        iterator.start_prefetch()
        return iterator

    def take_counts(self) -> dict[str, dict[str, int]]:
        """Growth of `faults` and `truncated` since the last call, under these names."""
        faults, truncated = self._reported
        self._reported = self.faults.copy(), self.truncated.copy()
        return {
            "faults": dict(sorted((self.faults - faults).items())),
            "truncated": {name: self.truncated[name] - truncated[name] for name in ("rows", "turns")},
        }

    def take_bad_rows(self) -> list[Fault]:
        """The rows that became `bad_rows` since the last call."""
        new, self._new_bad_rows = self._new_bad_rows, []
        return new

    def get_state(self) -> dict[str, int]:
        """The position after the last batch; the same on every host."""
        return {_STATE_KEY: self._step * self.dataset.config.batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        """Seeks to a position that get_state returned; the number of hosts and workers may differ."""
        self.close()
        self._step, within = divmod(int(state[_STATE_KEY]), self.dataset.config.batch_size)
        if within:
            raise ConfigError(
                f"DataConfig.batch_size is {self.dataset.config.batch_size}; no batch of this size begins at"
                f" position {state[_STATE_KEY]}"
            )

    def close(self) -> None:
        """Stops worker processes and threads. The next `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _log_bad_row(fault: Fault) -> None:
    _LOG.warning("row %d is replaced by another (%s): %s", fault.row, fault.reason, fault)


def _parse_absl_flags() -> None:
    """Marks absl's flags as parsed: grain reads one in worker processes, which fails otherwise."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
