"""The rows of every step: for one config, a function of (index, seed, step), the same on every host.

- The rows of a bucket form an endless stream: all rows in a random order, then all in another order, ...
- Batch k of a bucket takes positions k * B to (k + 1) * B of its stream. A remainder smaller than a batch
  continues in the next epoch, so no row is lost or favoured.
- An epoch holds the batches of all buckets that begin in it, in random order.
- With modality weights each modality has its own epochs, and a fixed pattern distributes the steps.

Only the rows of each bucket are stored. Any step is computed directly, so a run resumes from one integer.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np

from crosslmm_jax.data.batching.buckets import Bucket

_CYCLE = 1000  # modality weights are rounded to a thousandth
_ROUNDS = 4  # of grain's index shuffle: grain's default
_GROUPED = 2**20  # rows that are grouped at a time
_SHORT = 4096  # orders up to this length are permutations in memory: the index shuffle is slow on them


@dataclasses.dataclass(frozen=True)
class WeightedRows:
    """The rows of a bucket that have one weight.

    Attributes:
        rows: int[n], row numbers, ascending.
        weight: how often an epoch holds each row; may be a fraction.
    """

    rows: np.ndarray
    weight: Fraction = Fraction(1)

    def before(self, epoch: int) -> int:
        """Number of rows in the epochs before `epoch`."""
        return epoch * len(self.rows) * self.weight.numerator // self.weight.denominator


@dataclasses.dataclass(frozen=True)
class ScheduledBatch:
    """The rows of one global batch, in order, and their bucket."""

    bucket_number: int
    bucket: Bucket
    rows: np.ndarray  # int64[B]


class _BucketStream:
    """The endless stream of the rows of one bucket."""

    def __init__(self, number: int, parts: Sequence[WeightedRows], *, batch_size: int, key: str) -> None:
        self.number = number
        self.parts = parts
        self.batch_size = batch_size
        self.key = key  # "" keeps the rows in order

    def before(self, epoch: int) -> int:
        """Positions before `epoch`."""
        return sum(part.before(epoch) for part in self.parts)

    def first_batch(self, epoch: int) -> int:
        """Number of the first batch that begins in `epoch` or later."""
        return -(-self.before(epoch) // self.batch_size)

    def batch(self, number: int) -> np.ndarray:
        """int64[B], the rows of batch `number`."""
        begin = number * self.batch_size
        epoch = _last_at_most(self.before, begin)
        rows = []
        for position in range(begin, begin + self.batch_size):
            while self.before(epoch + 1) <= position:
                epoch += 1
            rows.append(self._row(epoch, position - self.before(epoch)))
        return np.array(rows, np.int64)

    def _row(self, epoch: int, place: int) -> int:
        length = self.before(epoch + 1) - self.before(epoch)
        place = _shuffled(place, length, f"{self.key}/{epoch}" if self.key else "")
        for part_number, part in enumerate(self.parts):
            held = part.before(epoch + 1) - part.before(epoch)
            if place < held:
                turn, within = divmod(part.before(epoch) + place, len(part.rows))
                key = f"{self.key}/{part_number}/{turn}" if self.key else ""
                return int(part.rows[_shuffled(within, len(part.rows), key)])
            place -= held
        raise AssertionError("a position lies in its epoch")


class _BucketMix:
    """The batches of several buckets, shuffled within each epoch."""

    def __init__(self, streams: Sequence[_BucketStream], *, key: str) -> None:
        self.streams = streams
        self.key = key

    def _first(self, epoch: int) -> int:
        return sum(stream.first_batch(epoch) for stream in self.streams)

    def batch(self, number: int) -> tuple[_BucketStream, np.ndarray]:
        """Batch `number`, counted over all buckets."""
        epoch = _last_at_most(self._first, number)
        place, begin = number - self._first(epoch), epoch
        length = self._first(epoch + 1) - self._first(epoch)
        place = _shuffled(place, length, f"{self.key}/{begin}" if self.key else "")
        for stream in self.streams:
            first = stream.first_batch(epoch)
            count = stream.first_batch(epoch + 1) - first
            if place < count:
                return stream, stream.batch(first + place)
            place -= count
        raise AssertionError("a batch lies in its epoch")


class Schedule:
    """Maps a step to its rows. Cheap to pickle: it holds the rows of each bucket and nothing else."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        rows: Sequence[Sequence[WeightedRows]],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        modality_weights: dict[str, float] | None = None,
    ) -> None:
        """Schedules batches of `batch_size` rows.

        Args:
            buckets: buckets with at least one row.
            rows: rows of each bucket, by weight.
            batch_size: B, rows of a global batch.
            seed: seed of every order.
            shuffle: False reads bucket after bucket, with rows in order.
            modality_weights: share of the steps of each modality that has rows; None: by number of rows.
        """
        self.buckets = list(buckets)
        self.rows = [list(parts) for parts in rows]
        streams = [
            _BucketStream(number, parts, batch_size=batch_size, key=f"{seed}/{number}" if shuffle else "")
            for number, parts in enumerate(rows)
        ]
        if modality_weights is None:
            mixes, weights = [streams], [1.0]
        else:
            held = {bucket.modality for bucket in self.buckets}
            names = [name for name, weight in modality_weights.items() if weight > 0 and name in held]
            mixes = [[s for s in streams if self.buckets[s.number].modality == name] for name in names]
            weights = [modality_weights[name] for name in names]
        self._mixes = [
            _BucketMix(mix, key=f"{seed}/mix{number}" if shuffle else "") for number, mix in enumerate(mixes)
        ]
        self._pattern, self._seen = _deal_steps(weights)

    def batch(self, step: int) -> ScheduledBatch:
        """The batch of `step`; steps count from 0."""
        cycle, place = divmod(step, len(self._pattern))
        mix = self._pattern[place]
        number = cycle * int(self._seen[-1, mix]) + int(self._seen[place, mix])
        stream, rows = self._mixes[mix].batch(number)
        return ScheduledBatch(stream.number, self.buckets[stream.number], rows)

    def replacement(self, bucket_number: int, row: int, attempt: int) -> int:
        """The row that replaces a damaged `row` at an attempt: of the same bucket, the same on every host."""
        parts = self.rows[bucket_number]
        place = zlib.crc32(f"{row}/{attempt}".encode()) % sum(len(part.rows) for part in parts)
        for part in parts:
            if place < len(part.rows):
                return int(part.rows[place])
            place -= len(part.rows)
        raise AssertionError("a bucket holds rows")


def group_rows(
    bucket_of_kind: np.ndarray, kind_of_row: np.ndarray, dataset_of_row: np.ndarray, *, num_buckets: int,
    weights: Sequence[Fraction],
) -> list[list[WeightedRows]]:  # fmt: skip
    """The rows of each bucket by the weight of their data set, the smallest weight first.

    Args:
        bucket_of_kind: int[kinds], number of the bucket of the rows of a kind; negative for none.
        kind_of_row: int[rows], kind of each row.
        dataset_of_row: int[rows], number of each row's data set.
        num_buckets: number of buckets.
        weights: weight of each data set.
    """
    different = sorted(set(weights))
    of_dataset = np.array([different.index(weight) for weight in weights])
    groups = num_buckets * len(different)  # the rows of a bucket with one weight; one more for other rows

    def group_slices() -> Iterator[tuple[int, np.ndarray]]:
        for begin in range(0, len(kind_of_row), _GROUPED):
            here = slice(begin, begin + _GROUPED)
            bucket = bucket_of_kind[kind_of_row[here]].astype(np.int64)
            group = np.where(bucket < 0, groups, bucket * len(different) + of_dataset[dataset_of_row[here]])
            yield begin, group.astype(np.min_scalar_type(groups))

    counts = sum(np.bincount(group, minlength=groups + 1) for _, group in group_slices())
    members = [np.empty(count, np.int32) for count in np.asarray(counts)[:groups].tolist()]
    filled = [0] * groups
    for begin, group in group_slices():
        order = np.argsort(group, kind="stable").astype(np.int32)  # a radix sort: groups are small numbers
        ends = np.cumsum(np.bincount(group, minlength=groups)).tolist()
        for number, (first, end) in enumerate(zip([0, *ends], ends[:groups], strict=False)):
            members[number][filled[number] : filled[number] + end - first] = order[first:end] + begin
            filled[number] += end - first
    rows: list[list[WeightedRows]] = [[] for _ in range(num_buckets)]
    for number, one in enumerate(members):
        if len(one):
            bucket, weight = divmod(number, len(different))
            rows[bucket].append(WeightedRows(one, different[weight]))
    return rows


def _last_at_most(before: Callable[[int], int], target: int) -> int:
    """The largest n with before(n) <= target; `before` grows from before(0) = 0 without bound."""
    high = 1
    while before(high) <= target:
        high *= 2
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if before(middle) <= target else (low, middle)
    return low


def _shuffled(place: int, length: int, key: str) -> int:
    """The element at `place` of the random order of 0..length-1 with seed `key`; "" keeps the order."""
    if not key or length == 1:
        return place
    seed = zlib.crc32(key.encode())
    if length <= _SHORT:
        return int(_permutation(length, seed)[place])
    from grain.experimental import index_shuffle

    return index_shuffle(place, max_index=length - 1, seed=seed, rounds=_ROUNDS)


@functools.lru_cache(maxsize=256)
def _permutation(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(length)


def _deal_steps(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """A cycle of steps in which each modality has its share, spread evenly.

    Returns:
        pattern: int[L], the modality of each step of the cycle.
        seen: int[L + 1, modalities], steps of each modality before each step.
    """
    shares = [weight / sum(weights) for weight in weights]
    counts = [max(1, round(share * _CYCLE)) for share in shares]
    divisor = math.gcd(*counts)
    counts = np.array([count // divisor for count in counts], np.int64)
    total = int(counts.sum())
    seen = np.zeros((total + 1, len(counts)), np.int64)
    pattern = np.zeros(total, np.int64)
    for step in range(total):
        pattern[step] = np.argmax((step + 1) * counts - seen[step] * total)
        seen[step + 1] = seen[step]
        seen[step + 1, pattern[step]] += 1
    return pattern, seen


def deal_evenly(costs: Sequence[int] | np.ndarray) -> np.ndarray:
    """Orders the rows of a batch so that contiguous parts of equal size cost about the same.

    Rows are sorted by descending cost and assigned to the parts in snake order: to two (or three, ...) parts,
    and the rows of each part again in the same way. Parts are even for any number of hosts that divides the
    batch, best for powers of two, and the order does not depend on that number.

    Args:
        costs: work of each row.

    Returns:
        int64[rows], positions in `costs`.
    """
    order = np.argsort(-np.asarray(costs, np.int64), kind="stable")
    return _deal(order)


def _deal(order: np.ndarray) -> np.ndarray:
    parts = _smallest_prime(len(order))
    if len(order) <= parts:
        return order
    rounds = order.reshape(-1, parts)
    rounds = np.where((np.arange(len(rounds)) % 2 == 1)[:, None], rounds[:, ::-1], rounds)
    return np.concatenate([_deal(rounds[:, part]) for part in range(parts)])


def _smallest_prime(number: int) -> int:
    for candidate in range(2, math.isqrt(number) + 1):
        if number % candidate == 0:
            return candidate
    return max(number, 1)
