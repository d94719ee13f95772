"""Buckets: the static shapes (F frames, T positions) to which the rows of an index are padded.

XLA compiles a program per shape, so rows of all modalities share a handful of shapes. A batch holds rows of
one bucket, which has one shape and one modality, so every host knows both without communication.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import MODALITIES
from crosslmm_jax.data.batching.bucket_search import choose_shapes
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
    min_rows: int,
) -> list[Bucket]:  # fmt: skip
    """For each modality the `shapes` (frames, text) that its rows need, in the order of the shapes.

    A bucket with fewer than `min_rows` rows is dropped if a larger one holds its rows. If none does, it takes
    over the rows of a smaller bucket, so that the rows of a batch differ.
    """
    names = [MODALITIES[code] for code in np.unique(modality).tolist()]
    buckets = [Bucket(name, *shape) for name in names for shape in shapes]
    keys = (modality.astype(np.int64) << 56) | (frames.astype(np.int64) << 32) | text
    keys, rows = np.unique(keys, return_counts=True)
    kinds = keys >> 56, (keys >> 32) & (2**24 - 1), keys & (2**32 - 1)
    while True:
        of_kind = assign(*kinds, buckets)
        rows_in = np.bincount(of_kind + 1, weights=rows, minlength=len(buckets) + 1)[1:].tolist()
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
    tokens_per_frame: int,
) -> Padding:  # fmt: skip
    """Padding when every row with a bucket is read once."""
    inside = bucket_of_row != NO_BUCKET
    number = bucket_of_row[inside]
    slots = np.array([b.frames for b in buckets], np.int64)[number]
    all_tokens = np.array([b.frames * tokens_per_frame + b.text for b in buckets], np.int64)[number]
    used = frames[inside].astype(np.int64)
    used_tokens = used * tokens_per_frame + text[inside]
    work, used_work = (row_cost(*sizes).sum() for sizes in ((slots, all_tokens), (used, used_tokens)))  # type: ignore[arg-type]
    return Padding(
        frames=_share(slots.sum() - used.sum(), slots.sum()),
        positions=_share(all_tokens.sum() - used_tokens.sum(), all_tokens.sum()),
        work=_share(work - used_work, work),
    )


def _share(part: int, whole: int) -> float:
    return float(part) / float(whole) if whole else 0.0


@dataclasses.dataclass(frozen=True)
class BucketedRows:
    """The bucket of each row of a run.

    Attributes:
        counts: frames and text tokens of all rows.
        buckets: the buckets, each with at least one row.
        bucket_of_row: int16[rows], number of each row's bucket, or NO_BUCKET.
        padding: when every row with a bucket is read once.
    """

    counts: TokenCounts
    buckets: list[Bucket]
    bucket_of_row: np.ndarray
    padding: Padding

    @property
    def num_without_bucket(self) -> int:
        """Rows without a bucket."""
        return int((self.bucket_of_row == NO_BUCKET).sum())

    @property
    def truncated(self) -> int:
        """Rows that are read and may lose their last turns."""
        return int((self.counts.truncated & (self.bucket_of_row != NO_BUCKET)).sum())


def bucket_rows(
    config: DataConfig, index: Index, columns: Columns, *, tokens_per_frame: int, more_system: int = 0
) -> BucketedRows:
    """Assigns the rows of an index to buckets: those of the config, or the best few by search.

    Args:
        config: data configuration of the run.
        index: the index.
        columns: columns of the index.
        tokens_per_frame: C.
        more_system: tokens by which the system prompt exceeds the default one.

    Raises:
        ConfigError: no row fits.
    """
    counts = row_token_counts(
        columns, config.sampling, most_text=config.most_text_tokens, style=config.style,
        time_instruction=config.time_instruction, wording=index.wording, more_system=more_system,
    )  # fmt: skip
    usable = counts.usable
    if config.frame_buckets:
        usable = usable & (counts.frames <= config.frame_buckets[-1])
    weights = config.modality_weights.as_dict()
    if weights:
        usable = usable & np.isin(columns.modality, [MODALITIES.index(name) for name in weights])
    if not usable.any():
        raise ConfigError(
            f"DataConfig: none of the {len(usable)} rows of {config.index} fits; look at style,"
            " text_buckets or max_text_tokens, frame_buckets and modality_weights"
        )
    kept = columns.modality[usable], counts.frames[usable], counts.text[usable]
    chosen = choose_shapes(*kept[1:], max_shapes=config.max_shapes, tokens_per_frame=tokens_per_frame)
    if config.text_buckets or config.frame_buckets:
        frame_sizes = {0, *(config.frame_buckets or (frames for frames, _ in chosen))}
        text_sizes = config.text_buckets or {text for _, text in chosen}
        pairs = [(frames, text) for frames in frame_sizes for text in text_sizes]
        chosen = sorted(pairs, key=lambda pair: row_cost(*pair))
    buckets = make_buckets(*kept, chosen, min_rows=config.batch_size)
    bucket_of_row = np.full(len(usable), NO_BUCKET, np.int16)
    bucket_of_row[usable] = assign(*kept, buckets)
    waste = padding(counts.frames, counts.text, bucket_of_row, buckets, tokens_per_frame=tokens_per_frame)
    return BucketedRows(counts, buckets, bucket_of_row, waste)
