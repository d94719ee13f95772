"""Buckets: the static shapes (F frames, T positions) to which the rows of an index are padded.

XLA compiles a program per shape, so rows of all modalities share a handful of shapes. A batch holds rows of
one bucket, which has one shape and one modality, so every host knows both without communication.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import MODALITIES
from crosslmm_jax.data.batching.bucket_search import choose_shapes
from crosslmm_jax.data.batching.kinds import Kinds, count_kinds
from crosslmm_jax.data.batching.none_fits import why_none_fits
from crosslmm_jax.data.batching.token_counts import TokenCounts, row_token_counts
from crosslmm_jax.data.index import Columns, Index
from crosslmm_jax.errors import ConfigError

NO_BUCKET = -1  # for a row that fits no bucket

# Cost of encoding a frame in tokens, without its compact tokens: the encoder's work per frame over the
# decoder's work per token, about 0.6 TFLOP to 3 GFLOP with the 2B model.
FRAME_COST = 200


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A static shape and the modality of its rows.

    Attributes:
        modality: one of MODALITIES.
        frames: F.
        text: text tokens of a row.
    """

    modality: str
    frames: int
    text: int

    @property
    def cost(self) -> int:
        """Work of a row of this shape, in text tokens."""
        return row_cost(self.frames, self.text)

    def holds(self, other: "Bucket") -> bool:
        """Whether this shape holds rows of `other`."""
        return other.frames <= self.frames and other.text <= self.text


def row_cost(frames: int, text: int) -> int:
    """Work of a row, in text tokens."""
    return frames * FRAME_COST + text


def make_buckets(
    modality: np.ndarray, frames: np.ndarray, text: np.ndarray, shapes: Sequence[tuple[int, int]], *,
    min_rows: int, rows: np.ndarray | None = None,
) -> list[Bucket]:  # fmt: skip
    """For each modality the `shapes` (frames, text) that its rows need, in the order of the shapes.

    `rows` is how many rows there are of each entry of the other arrays, by default one.

    A bucket with fewer than `min_rows` rows is dropped if a larger one holds its rows. If none does, it takes
    over the rows of a smaller bucket, so that the rows of a batch differ.
    """
    names = [MODALITIES[code] for code in np.unique(modality).tolist()]
    buckets = [Bucket(name, *shape) for name in names for shape in shapes]
    if rows is None:
        rows = np.ones(len(frames), np.int64)
    while True:
        number = assign(modality, frames, text, buckets)
        rows_in = np.bincount(number + 1, weights=rows, minlength=len(buckets) + 1)[1:].tolist()
        kept = {bucket: count for bucket, count in zip(buckets, rows_in, strict=True) if count}
        buckets = list(kept)
        for bucket in sorted(kept, key=lambda one: (kept[one], one)):
            dropped = _bucket_to_drop(bucket, kept) if kept[bucket] < min_rows else None
            if dropped is not None:
                buckets.remove(dropped)
                break
        else:
            return buckets


def _bucket_to_drop(bucket: Bucket, kept: dict[Bucket, float]) -> Bucket | None:
    """The bucket to drop so that the few rows of `bucket` share one: itself, a smaller one, or none."""
    others = [other for other in kept if other != bucket and other.modality == bucket.modality]
    if any(other.holds(bucket) for other in others):
        return bucket
    smaller = [other for other in others if bucket.holds(other)]
    return min(smaller, key=lambda one: (kept[one] * (bucket.cost - one.cost), one), default=None)


def assign(
    modality: np.ndarray, frames: np.ndarray, text: np.ndarray, buckets: Sequence[Bucket]
) -> np.ndarray:
    """int16[rows], for each row the number of the first bucket that holds it, or NO_BUCKET."""
    result = np.full(len(frames), NO_BUCKET, np.int16)
    for number, bucket in enumerate(buckets):
        fits = (modality == MODALITIES.index(bucket.modality)) & (result == NO_BUCKET)
        result[fits & (frames <= bucket.frames) & (text <= bucket.text)] = number
    return result


@dataclasses.dataclass(frozen=True)
class Padding:
    """Share of padding in the batches of one epoch.

    Attributes:
        frames: padded frames over all frames.
        positions: padded over all positions of the decoder (T), visual and text.
        work: padded over all work, with FRAME_COST positions per frame for its encoding.
    """

    frames: float
    positions: float
    work: float


def padding(
    frames: np.ndarray, text: np.ndarray, bucket_of_row: np.ndarray, buckets: Sequence[Bucket], *,
    tokens_per_frame: int, rows: np.ndarray | None = None,
) -> Padding:  # fmt: skip
    """Padding when every row with a bucket is read once; `rows` as for `make_buckets`."""
    inside = bucket_of_row != NO_BUCKET
    number = bucket_of_row[inside]
    times = np.ones(len(number), np.int64) if rows is None else rows[inside]
    slots = np.array([b.frames for b in buckets], np.int64)[number]
    all_tokens = np.array([b.frames * tokens_per_frame + b.text for b in buckets], np.int64)[number]
    used = frames[inside].astype(np.int64)
    used_tokens = used * tokens_per_frame + text[inside]
    work, used_work = row_cost(slots, all_tokens), row_cost(used, used_tokens)  # type: ignore[arg-type]

    def share(part: np.ndarray, whole: np.ndarray) -> float:
        total = int(times @ whole)
        return int(times @ part) / total if total else 0.0

    return Padding(
        frames=share(slots - used, slots),
        positions=share(all_tokens - used_tokens, all_tokens),
        work=share(np.asarray(work - used_work), np.asarray(work)),
    )


@dataclasses.dataclass(frozen=True)
class BucketedRows:
    """The bucket of each row of a run.

    Attributes:
        kinds: the sizes of all rows, and how many rows have each.
        kind_of_row: int32[rows], place in `kinds`.
        dataset_of_row: uint[rows], position in `Index.datasets`.
        buckets: the buckets, each with at least one row.
        bucket_of_kind: int16[kinds], number of the bucket of the rows of a kind, or NO_BUCKET.
        padding: when every row with a bucket is read once.
    """

    kinds: Kinds
    kind_of_row: np.ndarray
    dataset_of_row: np.ndarray
    buckets: list[Bucket]
    bucket_of_kind: np.ndarray
    padding: Padding

    @property
    def bucket_of_row(self) -> np.ndarray:
        """int16[rows], number of each row's bucket, or NO_BUCKET."""
        return self.bucket_of_kind[self.kind_of_row]

    @property
    def num_without_bucket(self) -> int:
        """Rows without a bucket."""
        return int(self.kinds.rows[self.bucket_of_kind == NO_BUCKET].sum())

    @property
    def truncated(self) -> int:
        """Rows that are read and may lose their last turns."""
        return int(self.kinds.rows[self.kinds.truncated & (self.bucket_of_kind != NO_BUCKET)].sum())


def _choose(config: DataConfig, kept: Kinds, tokens_per_frame: int) -> list[Bucket]:
    """The buckets of the config, or the best few by search."""
    chosen = choose_shapes(
        kept.frames,
        kept.text,
        rows=kept.rows,
        max_shapes=config.max_shapes,
        tokens_per_frame=tokens_per_frame,
    )
    if config.text_buckets or config.frame_buckets:
        frame_sizes = {0, *(config.frame_buckets or (frames for frames, _ in chosen))}
        text_sizes = config.text_buckets or {text for _, text in chosen}
        pairs = [(frames, text) for frames in frame_sizes for text in text_sizes]
        chosen = sorted(pairs, key=lambda pair: row_cost(*pair))
    sizes = kept.modality, kept.frames, kept.text
    return make_buckets(*sizes, chosen, min_rows=config.batch_size, rows=kept.rows)


def _used(buckets: Sequence[Bucket], sizes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[Bucket]:
    """Those of `buckets` that hold rows of these modalities, frames and text tokens."""
    numbers = set(assign(*sizes, buckets).tolist())
    return [bucket for number, bucket in enumerate(buckets) if number in numbers]


def bucket_rows(
    config: DataConfig, index: Index, tables: Callable[[], Iterable[Columns]], *, num_rows: int,
    tokens_per_frame: int, more_system: int = 0, buckets: Sequence[Bucket] | None = None,
) -> BucketedRows:  # fmt: skip
    """Assigns the rows of an index to buckets: those of the config, or the best few by search.

    Args:
        config: data configuration of the run.
        index: the index.
        tables: gives its columns, in parts.
        num_rows: number of rows of all parts.
        tokens_per_frame: C.
        more_system: tokens by which the system prompt exceeds the default one.
        buckets: the buckets to use; None: they are chosen.

    Raises:
        ConfigError: no row fits.
    """

    def count(columns: Columns) -> TokenCounts:
        return row_token_counts(
            columns, config.sampling, most_text=config.most_text_tokens, style=config.style,
            time_instruction=config.time_instruction, wording=index.wording, more_system=more_system,
        )  # fmt: skip

    counted = ((columns, count(columns)) for columns in tables())
    kinds, kind_of_row, dataset_of_row = count_kinds(
        counted, num_rows=num_rows, num_datasets=len(index.datasets)
    )
    usable = kinds.usable
    if config.frame_buckets:
        usable = usable & (kinds.frames <= config.frame_buckets[-1])
    weights = config.modality_weights.as_dict()
    if weights:
        usable = usable & np.isin(kinds.modality, [MODALITIES.index(name) for name in weights])
    if not usable.any():
        again = ((columns.modality, count(columns)) for columns in tables())
        raise ConfigError(
            f"DataConfig: none of the {num_rows} rows of {config.index} fits: {why_none_fits(config, again)}"
        )
    kept = kinds.where(usable)
    sizes = kept.modality, kept.frames, kept.text
    buckets = _choose(config, kept, tokens_per_frame) if buckets is None else _used(buckets, sizes)
    if not buckets:
        raise ConfigError(
            f"DataConfig: none of the {num_rows} rows of {config.index} fits a shape of the rows that are"
            " trained on; raise text_buckets or frame_buckets, or choose other rows"
        )
    bucket_of_kind = np.full(len(usable), NO_BUCKET, np.int16)
    bucket_of_kind[usable] = assign(*sizes, buckets)
    waste = padding(
        kinds.frames, kinds.text, bucket_of_kind, buckets, tokens_per_frame=tokens_per_frame, rows=kinds.rows
    )
    return BucketedRows(kinds, kind_of_row, dataset_of_row, buckets, bucket_of_kind, waste)
