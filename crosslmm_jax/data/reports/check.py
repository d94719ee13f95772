"""Decodes the media of an index, all or a sample, and lists what fails."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.index import RowStore, only_data_errors, open_index
from crosslmm_jax.data.media import (
    DEADLINE_S,
    MAX_DAMAGED,
    Media,
    MediaOptions,
    open_media,
    probe,
    read_frames,
)
from crosslmm_jax.errors import DataError, Fault
from crosslmm_jax.utils import Progress, map_in_order

_SIZE = 32  # pixels: decoding can fail, resizing cannot
_CHUNK = 64  # most rows per task of a worker; a medium that several of them share is read once


class Damaged(NamedTuple):
    """A video that is read although some of its frames are damaged."""

    path: str
    damaged: int  # frames
    frames: int  # all frames of the video


def check_index(
    folder: str, *, sampling: SamplingConfig, sample: int | None = None, workers: int = 0, seed: int = 0,
    allow_outside: bool = False, deadline_s: float | None = DEADLINE_S, quiet: bool = False,
    max_damaged: float = MAX_DAMAGED, on_bad_row: Callable[[Fault], None] | None = None,
    on_damaged: Callable[[Damaged], None] | None = None,
) -> tuple[int, list[Fault]]:  # fmt: skip
    """Decodes rows as training would, and all frames of their videos to count damaged ones.

    Args:
        folder: INDEX.
        sampling: which frames are read.
        sample: number of rows, drawn at random; None: all rows.
        workers: worker processes; 0: this process decodes.
        seed: seed of the sample.
        allow_outside: media may lie outside their root.
        deadline_s: seconds, as for `read_frames`.
        quiet: show no progress on stderr.
        max_damaged: share of damaged frames above which a video fails, as for `read_frames`.
        on_bad_row: called with the fault of each row that fails, as soon as it is known.
        on_damaged: called once for each video that is read although some of its frames are damaged.

    Returns:
        Number of rows that were read, and the faults of those that failed; `Fault.row` is their number in the
        index.

    Raises:
        UserError: the index cannot be read, or a worker process died.
    """
    index = open_index(folder)
    numbers = np.arange(len(index))
    if sample is not None and sample < len(index):
        numbers = np.sort(np.random.default_rng(seed).choice(len(index), sample, replace=False))
    size = min(max(len(numbers) // (8 * max(workers, 1)), 1), _CHUNK)
    begins = range(0, len(numbers), size)
    progress = Progress("check", unit="rows", total=len(numbers), quiet=quiet)
    bad: list[Fault] = []
    told: set[Damaged] = set()
    check = functools.partial(
        _check_rows, RowStore(index), sampling=sampling, allow_outside=allow_outside, deadline_s=deadline_s,
        max_damaged=max_damaged,
    )  # fmt: skip
    results = map_in_order(
        check, (numbers[begin : begin + size].tolist() for begin in begins), workers=workers,
        spare=8 * workers, if_one_dies="check again with fewer --workers",
    )  # fmt: skip
    try:
        for begin, (found, damaged) in zip(begins, results, strict=True):
            bad += found
            if on_damaged is not None:
                for video in damaged:
                    if video not in told:
                        told.add(video)
                        on_damaged(video)
            if on_bad_row is not None:
                for row in found:
                    on_bad_row(row)
            progress.update(min(begin + size, len(numbers)), f"{len(bad)} bad")
    finally:
        progress.close()
    return len(numbers), bad


def _check_rows(
    rows: RowStore, numbers: list[int], *, sampling: SamplingConfig, allow_outside: bool,
    deadline_s: float | None, max_damaged: float = MAX_DAMAGED,
) -> tuple[list[Fault], list[Damaged]]:  # fmt: skip
    damaged: list[Damaged] = []

    @functools.cache
    def count(medium: Media) -> None:
        info = probe(medium, decode_up_to=None, max_damaged=max_damaged, deadline_s=deadline_s)
        if info.damaged:
            damaged.append(Damaged(str(medium), info.damaged, info.num_frames))

    @functools.cache
    def fault_of(
        root: str, reference: str, bounds: tuple[float, float] | None, options: MediaOptions
    ) -> Fault | None:
        try:
            with only_data_errors(root, reference):
                medium = open_media(root, reference, options, allow_outside=allow_outside)
                count(medium)
                read_frames(
                    medium, sampling, size=_SIZE, bounds=bounds, max_damaged=max_damaged,
                    deadline_s=deadline_s,
                )  # fmt: skip
        except DataError as error:
            return error.fault  # the error itself would keep what was open
        return None

    bad = []
    for number in numbers:
        row = rows[number]
        for reference in row.media:
            if (fault := fault_of(row.root, reference, row.bounds, row.media_options)) is not None:
                bad.append(dataclasses.replace(row.fault(fault), row=number))
                break
    return bad, damaged
