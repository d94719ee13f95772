"""Kinds of rows: rows of one modality with equal numbers of frames and text tokens.

Millions of rows are of a few thousand kinds. Buckets are chosen, filled and judged by kinds, so that a row
costs one number.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from crosslmm_jax.data.batching.token_counts import TokenCounts
from crosslmm_jax.data.index import Columns

_SLICE = 2**20  # rows whose keys are held at a time
# Bits of a key: 0-31 text, 32-55 frames, then the modality and two flags.
_FRAMES, _MODALITY, _USABLE, _TRUNCATED = 32, 56, 60, 61


@dataclasses.dataclass(frozen=True)
class Kinds:
    """The kinds of some rows, in ascending order of modality, frames and text.

    Attributes:
        modality: int64[kinds], position in MODALITIES.
        frames: int64[kinds], frames of all media of a row.
        text: int64[kinds], text tokens of a row.
        usable: bool[kinds], as in `TokenCounts`.
        truncated: bool[kinds], as in `TokenCounts`.
        rows: int64[kinds], number of rows.
    """

    modality: np.ndarray
    frames: np.ndarray
    text: np.ndarray
    usable: np.ndarray
    truncated: np.ndarray
    rows: np.ndarray

    def where(self, chosen: np.ndarray) -> "Kinds":
        """Those with a True in `chosen`, bool[kinds]."""
        return Kinds(**{f.name: getattr(self, f.name)[chosen] for f in dataclasses.fields(self)})


def count_kinds(
    parts: Iterable[tuple[Columns, TokenCounts]], *, num_rows: int, num_datasets: int
) -> tuple[Kinds, np.ndarray, np.ndarray]:
    """The kinds of `num_rows` rows, which come in parts.

    Returns:
        The kinds; int32[rows], the kind of each row; uint[rows], the data set of each row.
    """
    places = np.empty(num_rows, np.int32)
    datasets = np.empty(num_rows, np.min_scalar_type(num_datasets))
    slices: list[tuple[slice, np.ndarray]] = []  # of `places`, with the keys that their numbers stand for
    waiting: list[np.ndarray] = []
    begin = done = 0
    for columns, counts in parts:
        here = slice(begin, begin := begin + len(columns.modality))
        datasets[here] = columns.dataset
        waiting.append(_encode(columns, counts))
        if begin - done >= _SLICE or begin == num_rows:
            # By hashing, which is faster than sorting.
            encoded = pa.array(np.concatenate(waiting)).dictionary_encode()
            places[done:begin] = encoded.indices.to_numpy()
            slices.append((slice(done, begin), encoded.dictionary.to_numpy()))
            waiting, done = [], begin
    keys = np.unique(np.concatenate([found for _, found in slices]))
    rows = np.zeros(len(keys), np.int64)
    for here, found in slices:
        places[here] = np.searchsorted(keys, found).astype(np.int32)[places[here]]
        rows += np.bincount(places[here], minlength=len(keys))
    return _decode(keys, rows), places, datasets


def _encode(columns: Columns, counts: TokenCounts) -> np.ndarray:
    key = columns.modality.astype(np.int64) << _MODALITY
    key |= counts.frames.astype(np.int64) << _FRAMES
    key |= counts.text.astype(np.int64)
    key |= counts.usable.astype(np.int64) << _USABLE
    return key | counts.truncated.astype(np.int64) << _TRUNCATED


def _decode(keys: np.ndarray, rows: np.ndarray) -> Kinds:
    return Kinds(
        modality=(keys >> _MODALITY) & 15, frames=(keys >> _FRAMES) & (2**24 - 1), text=keys & (2**32 - 1),
        usable=(keys >> _USABLE & 1).astype(bool), truncated=(keys >> _TRUNCATED & 1).astype(bool), rows=rows,
    )  # fmt: skip
