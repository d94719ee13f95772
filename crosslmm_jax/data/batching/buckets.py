"""Which static shapes (F frames, T positions) the rows of an index are padded to.

XLA compiles a program for every shape, so there may be a handful, which rows of all modalities share. A
batch holds rows of one bucket: one shape and one modality whichever rows it holds, and every host knows both
without asking.
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

NO_BUCKET = -1  # bucket of a row that fits no shape

# What a frame costs in tokens, its own compact ones aside: the encoder's work on it over the decoder's on a
# token, about 0.6 TFLOP to 3 GFLOP with the 2B model.
FRAME_COST = 200


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """A static shape, and the modality of the rows that are padded to it.

    Attributes:
        modality: one of MODALITIES.
        frames: F.
        text: tokens of a row that are not visual.
    """

    modality: str
    frames: int
    text: int

    @property
    def cost(self) -> int:
        """Work that a row of this shape makes, in tokens."""
        return row_cost(self.frames, self.text)

    def holds(self, other: "Bucket") -> bool:
        """Whether rows of `other` fit this shape."""
        return other.frames <= self.frames and other.text <= self.text


def row_cost(frames: int, text: int) -> int:
    """Work that a row makes, in tokens of text."""
    return frames * FRAME_COST + text


def make_buckets(
    modality: np.ndarray, frames: np.ndarray, text: np.ndarray, shapes: Sequence[tuple[int, int]], *,
    min_rows: int,
) -> list[Bucket]:  # fmt: skip
    """For each modality those of the `shapes` (frames, text) that its rows need, in the order of the shapes.

    A bucket with fewer than `min_rows` rows is given up for a larger one that holds them too; where there is
    none it takes over the rows of a smaller one, so that batches hold different rows.
    """
    names = [MODALITIES[code] for code in np.unique(modality).tolist()]
    buckets = [Bucket(name, *shape) for name in names for shape in shapes]
    keys = (modality.astype(np.int64) << 56) | (frames.astype(np.int64) << 32) | text
    keys, rows = np.unique(keys, return_counts=True)
    kinds = keys >> 56, (keys >> 32) & (2**24 - 1), keys & (2**32 - 1)
    while True:
        of_kind = assign(*kinds, buckets)
        counts = np.bincount(of_kind + 1, weights=rows, minlength=len(buckets) + 1)[1:].tolist()
        kept = {bucket: count for bucket, count in zip(buckets, counts, strict=True) if count}
        buckets = list(kept)
        for bucket in sorted(kept, key=lambda one: (kept[one], one)):
            goes = _given_up(bucket, kept) if kept[bucket] < min_rows else None
            if goes is not None:
                buckets.remove(goes)
                break
        else:
            return buckets


def _given_up(bucket: Bucket, kept: dict[Bucket, float]) -> Bucket | None:
    """Which bucket goes so that the few rows of `bucket` get company: itself, a smaller one, or none."""
    others = [other for other in kept if other != bucket and other.modality == bucket.modality]
    if any(other.holds(bucket) for other in others):
        return bucket
    smaller = [other for other in others if bucket.holds(other)]
    return min(smaller, key=lambda one: (kept[one] * (bucket.cost - one.cost), one), default=None)


def assign(
    modality: np.ndarray, frames: np.ndarray, text: np.ndarray, buckets: Sequence[Bucket]
) -> np.ndarray:
    """int16[rows]: for each row the first of `buckets` that holds it, or NO_BUCKET."""
    result = np.full(len(frames), NO_BUCKET, np.int16)
    for number, bucket in enumerate(buckets):
        fits = (modality == MODALITIES.index(bucket.modality)) & (result == NO_BUCKET)
        result[fits & (frames <= bucket.frames) & (text <= bucket.text)] = number
    return result


@dataclasses.dataclass(frozen=True)
class Padding:
    """How much of the batches of one epoch is padding.

    Attributes:
        frames: share of the frames.
        positions: share of the decoder's positions (T), those of frames and of text.
        work: share of the work, where a frame weighs as many positions as its encoding costs.
    """

    frames: float
    positions: float
    work: float


def padding(
    frames: np.ndarray, text: np.ndarray, bucket_of_row: np.ndarray, buckets: Sequence[Bucket], *,
    tokens_per_frame: int,
) -> Padding:  # fmt: skip
    """The padding when every row that fits a bucket is read once."""
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
    """Which rows a run reads, and padded to what.

    Attributes:
        counts: frames and text tokens of all rows.
        buckets: shapes of batches.
        bucket_of_row: int16[rows], the bucket of each row, or NO_BUCKET.
        padding: when each row that has a bucket is read once.
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
        """Rows that are read and may lose turns at their end."""
        return int((self.counts.truncated & (self.bucket_of_row != NO_BUCKET)).sum())


def bucket_rows(
    config: DataConfig, index: Index, columns: Columns, *, tokens_per_frame: int, more_system: int = 0
) -> BucketedRows:
    """The shapes of a run.

    Args:
        config: of the run.
        index: its index.
        columns: of the index.
        tokens_per_frame: C.
        more_system: tokens by which the system prompt exceeds the default one.

    Raises:
        ConfigError: no row fits.
    """
    lengths = row_token_counts(
        columns, config.sampling, most_text=config.most_text_tokens, style=config.style,
        time_instruction=config.time_instruction, wording=index.wording, more_system=more_system,
    )  # fmt: skip
    usable = lengths.usable
    if config.frame_buckets:
        usable = usable & (lengths.frames <= config.frame_buckets[-1])
    weights = config.modality_weights.as_dict()
    if weights:
        usable = usable & np.isin(columns.modality, [MODALITIES.index(name) for name in weights])
    if not usable.any():
        raise ConfigError(
            f"DataConfig: none of the {len(usable)} rows of {config.index} fits; look at style,"
            " text_buckets or max_text_tokens, frame_buckets and modality_weights"
        )
    kept = columns.modality[usable], lengths.frames[usable], lengths.text[usable]
    chosen = choose_shapes(*kept[1:], max_shapes=config.max_shapes, tokens_per_frame=tokens_per_frame)
    if config.text_buckets or config.frame_buckets:
        frame_sizes = {0, *(config.frame_buckets or (frames for frames, _ in chosen))}
        text_sizes = config.text_buckets or {text for _, text in chosen}
        pairs = [(frames, text) for frames in frame_sizes for text in text_sizes]
        chosen = sorted(pairs, key=lambda pair: row_cost(*pair))
    buckets = make_buckets(*kept, chosen, min_rows=config.batch_size)
    bucket_of_row = np.full(len(usable), NO_BUCKET, np.int16)
    bucket_of_row[usable] = assign(*kept, buckets)
    waste = padding(lengths.frames, lengths.text, bucket_of_row, buckets, tokens_per_frame=tokens_per_frame)
    return BucketedRows(lengths, buckets, bucket_of_row, waste)
