"""Decodes the media of an index, all or a sample, and tells what fails."""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.index import Index, RowStore, guarded, open_index
from crosslmm_jax.data.media import DEADLINE_S, open_media, read_frames
from crosslmm_jax.errors import DataError, Fault, UserError
from crosslmm_jax.utils import Progress, worker_pool

_SIZE = 32  # pixels: decoding is what may fail, not resizing
_CHUNK = 64  # rows that a worker gets at once, at most: a medium that several of them name is read once
_STORES: dict[tuple[str, str], RowStore] = {}  # of this process, by folder and digest


def check_index(
    folder: str, *, sampling: SamplingConfig, sample: int | None = None, workers: int = 0, seed: int = 0,
    allow_outside: bool = False, deadline_s: float | None = DEADLINE_S, quiet: bool = False,
    on_bad_row: Callable[[Fault], None] | None = None,
) -> tuple[int, list[Fault]]:  # fmt: skip
    """Decodes rows as training would.

    Args:
        folder: INDEX.
        sampling: frames that are read.
        sample: so many rows, drawn at random; None: all.
        workers: processes; 0 decodes in this one.
        seed: of the sample.
        allow_outside: media may lie outside their root, as the index was told.
        deadline_s: as `read_frames` takes it.
        quiet: no progress on stderr.
        on_bad_row: called with each row that fails, as soon as it is known.

    Returns:
        How many rows were read, and those that failed.

    Raises:
        UserError: the index cannot be read, or a worker process died.
    """
    index = open_index(folder)
    numbers = np.arange(len(index))
    if sample is not None and sample < len(index):
        numbers = np.sort(np.random.default_rng(seed).choice(len(index), sample, replace=False))
    size = min(max(len(numbers) // (8 * max(workers, 1)), 1), _CHUNK)
    chunks = [numbers[begin : begin + size].tolist() for begin in range(0, len(numbers), size)]
    progress = Progress("check", unit="rows", total=len(numbers), quiet=quiet)
    bad: list[Fault] = []
    done = 0
    pool = worker_pool(workers) if workers else None
    try:
        run = pool.map if pool else map
        check = functools.partial(
            _check_rows, index, sampling=sampling, allow_outside=allow_outside, deadline_s=deadline_s
        )
        for chunk, found in zip(chunks, run(check, chunks), strict=True):
            bad += found
            if on_bad_row is not None:
                for row in found:
                    on_bad_row(row)
            done += len(chunk)
            progress.update(done, f"{len(bad)} bad")
    except BrokenProcessPool as error:
        raise UserError(
            f"{folder}: a worker process died, perhaps for want of memory, after {done} of {len(numbers)}"
            " rows; check again with fewer --workers"
        ) from error
    finally:
        progress.close()
        if pool:
            pool.shutdown(cancel_futures=True)
    return len(numbers), bad


def _check_rows(
    index: Index, numbers: list[int], *, sampling: SamplingConfig, allow_outside: bool,
    deadline_s: float | None,
) -> list[Fault]:  # fmt: skip
    store = _STORES.setdefault((index.folder, index.digest), RowStore(index))

    @functools.cache
    def fault_of(root: str, reference: str, bounds: tuple[float, float] | None) -> Fault | None:
        try:
            with guarded(root, reference):
                medium = open_media(root, reference, allow_outside=allow_outside)
                read_frames(medium, sampling, size=_SIZE, bounds=bounds, deadline_s=deadline_s)
        except DataError as error:
            return error.fault  # the error itself would keep what was open
        return None

    bad = []
    for number in numbers:
        row = store[number]
        for reference in row.media:
            if (fault := fault_of(row.root, reference, row.bounds)) is not None:
                bad.append(dataclasses.replace(row.fault(fault), row=number))
                break
    return bad
