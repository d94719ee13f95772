"""Which static shapes (F frames, T positions) the rows of an index are padded to.

XLA compiles a program for every shape, so there may be a handful, which rows of all modalities share. A
batch holds rows of one bucket: one shape and one modality whichever rows it holds, and every host knows both
without asking.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from crosslmm_jax.data.annotations import MODALITIES

LEFT_OUT = -1  # bucket of a row that fits no shape

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
    """int16[rows]: for each row the first of `buckets` that holds it, or LEFT_OUT."""
    result = np.full(len(frames), LEFT_OUT, np.int16)
    for number, bucket in enumerate(buckets):
        fits = (modality == MODALITIES.index(bucket.modality)) & (result == LEFT_OUT)
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
    frames: np.ndarray, text: np.ndarray, of_row: np.ndarray, buckets: Sequence[Bucket], *,
    tokens_per_frame: int,
) -> Padding:  # fmt: skip
    """The padding when every row that fits a bucket is read once."""
    inside = of_row != LEFT_OUT
    number = of_row[inside]
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
