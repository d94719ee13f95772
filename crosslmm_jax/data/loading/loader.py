"""The input pipeline on grain: steps of the plan to the batches of this host.

The global batch of a step is a function of (index, seed, step) alone. A host takes a contiguous part of it,
so the batch put together from all hosts is the same for any number of hosts and of worker processes. The
whole position is one integer, `global_next_index`: rows read so far, B a step.

grain's own ElasticIterator keeps the same state, but it stacks examples of equal shape and deals the rows of
a batch out one by one; here batches are collated to buckets inside the workers, and grain hands their arrays
to this process in shared memory.
"""

import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from crosslmm_jax.batch import Batch
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.errors import ConfigError, Fault, UserError, list_counts
from crosslmm_jax.utils import end_with_parent

_LOG = logging.getLogger(__name__)
_STATE_KEY = "global_next_index"
_MIN_SEEN = 200  # rows before the share of bad ones can stop a run
_LISTED = 10  # bad rows that the error names
_RESTARTS = 3  # of workers that died, without a batch in between


class _BatchLoader:
    """Batch number to batch, in whichever process grain runs it."""

    def __init__(self, dataset: Dataset, *, start: int, shard_index: int, shard_count: int) -> None:
        self.dataset = dataset
        self.start = start
        host_batch = dataset.config.batch_size // shard_count
        self.part = slice(shard_index * host_batch, (shard_index + 1) * host_batch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy in a worker process of grain, which itself would outlive a training that was killed."""
        self.__dict__.update(state)
        end_with_parent()

    def __call__(self, number: int) -> dict[str, Any]:
        """Errors of the user's making travel as text, since grain rewrites exceptions between processes."""
        bad: list[Fault] = []
        try:
            scheduled = self.dataset.scheduled(self.start + number)
            examples = []
            for row in scheduled.rows[self.part].tolist():
                substitute = functools.partial(self.dataset.schedule.substitute, scheduled.bucket_number, row)
                example, failed = self.dataset.loader(row, scheduled.bucket, substitute)
                examples.append(example)
                bad += failed
            dropped = [count for one in examples if (count := one.sequence.dropped_turns)]
            batch = self.dataset.collate(examples, scheduled.bucket)
            return {"batch": batch, "bad": bad, "dropped_turns": dropped, "error": ""}
        except UserError as error:
            return {"batch": {}, "bad": bad, "dropped_turns": [], "error": str(error)}


class BatchIterator(Iterator[Batch]):
    """Batches of this host, without end.

    Attributes:
        bad_rows: row number -> why its media could not be read, of all batches handed out so far.
        faults: reason -> how often another row took a bad one's place.
        truncated: "rows" that were cut because they were too long, and the "turns" that they lost.
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
        """See `make_iterator`."""
        self.dataset = dataset
        self.bad_rows: dict[int, str] = {}
        self.faults: Counter[str] = Counter()
        self.truncated = Counter(rows=0, turns=0)
        self._told = self.faults.copy(), self.truncated.copy()
        self._seen = 0
        self._shard = (shard_index, shard_count)
        self._on_bad_row = on_bad_row or _log_bad_row
        self._iterator: Any = None
        self._step = 0
        self.set_state({_STATE_KEY: global_next_index})

    def __next__(self) -> Batch:
        """The next batch. Raises UserError when rows cannot be used, or workers die again and again."""
        result = self._next_result()
        self._seen += self.dataset.config.batch_size // self._shard[1]
        for fault in result["bad"]:
            self.faults[fault.reason] += 1
            if fault.row not in self.bad_rows:
                self.bad_rows[fault.row] = str(fault)
                self._on_bad_row(fault)
        dropped = [int(turns) for turns in result["dropped_turns"]]
        self.truncated.update(rows=len(dropped), turns=sum(dropped))
        if result["error"]:
            raise UserError(result["error"])
        self._check_share()
        self._step += 1
        return result["batch"]

    def _next_result(self) -> dict[str, Any]:
        for attempt in range(_RESTARTS + 1):
            if self._iterator is None:
                self._iterator = self._start()
            try:
                return next(self._iterator)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                self.close()
                _LOG.warning("a worker process died at step %d; started again (%d)", self._step, attempt + 1)
        raise UserError(
            f"worker processes died {_RESTARTS + 1} times in a row at step {self._step}, perhaps for want of"
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
            f" DataConfig.max_bad_fraction {limit}; mend the files or raise it. First: {named}"
        )

    def _start(self) -> Any:
        import grain

        config = self.dataset.config
        shard_index, shard_count = self._shard
        load = _BatchLoader(self.dataset, start=self._step, shard_index=shard_index, shard_count=shard_count)
        batches = grain.MapDataset.range(sys.maxsize // config.batch_size).map(load)
        read = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)
        stream = batches.to_iter_dataset(read)
        if config.num_workers:
            _parse_absl_flags()
            ahead = max(1, config.prefetch // config.num_workers)
            options = grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=ahead)
            stream = stream.mp_prefetch(options)
        return iter(stream)

    def take_counts(self) -> dict[str, dict[str, int]]:
        """What `faults` and `truncated` gained since the last call, under these names."""
        faults, truncated = self._told
        self._told = self.faults.copy(), self.truncated.copy()
        return {
            "faults": dict(sorted((self.faults - faults).items())),
            "truncated": {name: self.truncated[name] - truncated[name] for name in ("rows", "turns")},
        }

    def get_state(self) -> dict[str, int]:
        """The position after the last batch handed out; the same on every host."""
        return {_STATE_KEY: self._step * self.dataset.config.batch_size}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position from `get_state`, of any number of hosts and workers."""
        self.close()
        self._step, within = divmod(int(state[_STATE_KEY]), self.dataset.config.batch_size)
        if within:
            raise ConfigError(
                f"DataConfig.batch_size is {self.dataset.config.batch_size}; position {state[_STATE_KEY]} is"
                " not the begin of a batch of this size"
            )

    def close(self) -> None:
        """Ends worker processes and threads; a later `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _log_bad_row(fault: Fault) -> None:
    _LOG.warning("another row takes the place of row %d (%s): %s", fault.row, fault.reason, fault)


def _parse_absl_flags() -> None:
    """grain reads an absl flag in worker processes, which fails unless flags count as parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def make_iterator(
    dataset: Dataset,
    *,
    global_next_index: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    on_bad_row: Callable[[Fault], None] | None = None,
) -> BatchIterator:
    """Batches of one host from row position `global_next_index` on.

    Args:
        dataset: rows and settings.
        global_next_index: position to start at, a value of `BatchIterator.get_state`.
        shard_index: which of the hosts this is.
        shard_count: how many hosts share a global batch.
        on_bad_row: called once for each row whose media cannot be read; by default a warning is logged.

    Raises:
        ConfigError: the batch does not divide among hosts, or the position is no multiple of it.
    """
    if dataset.config.batch_size % shard_count:
        raise ConfigError(
            f"DataConfig.batch_size is {dataset.config.batch_size}; it must be a multiple of the"
            f" {shard_count} hosts"
        )
    return BatchIterator(
        dataset, global_next_index=global_next_index, shard_index=shard_index, shard_count=shard_count,
        on_bad_row=on_bad_row,
    )  # fmt: skip
