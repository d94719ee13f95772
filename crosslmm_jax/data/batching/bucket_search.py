"""Search for the few static shapes (frames, text) to which rows are padded with the least waste.

A row takes the cheapest shape that holds it. The search is greedy: it adds shapes one by one where each saves
most, then repeatedly removes the least useful shape and moves the others to their best places. All sums are
integers, so that every host finds the same shapes on any processor.
"""

import numpy as np

TEXT_STEP = 16  # tokens; text sizes are multiples of this
FRAME_STEP = 4  # frames; frame sizes above 4 are multiples of this
_LEVELS = (30, 40)  # sizes of frames and of text to try
_SPARE = 16  # shapes added beyond `max_shapes` before removal starts
_WORTH = 0.002  # share of the work without padding; a shape that saves less is removed
_ROUNDS = 10  # of moving all shapes; a few suffice
_NEVER = 10**9  # cost of a shape that does not hold the row


def choose_shapes(
    frames: np.ndarray, text: np.ndarray, *, rows: np.ndarray | None = None, max_shapes: int,
    tokens_per_frame: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """At most `max_shapes` pairs (frames, text) that hold every row with little padding, cheapest first.

    The search minimises the sum of two shares: padded frames over all frames, and padded decoder positions
    (frames * C + text) over all positions.

    Args:
        frames: int64[kinds], frames of a row.
        text: int64[kinds], text tokens of a row.
        rows: int64[kinds], number of rows of each kind; None: one.
        max_shapes: limit.
        tokens_per_frame: C.
    """
    # At this price of a frame, in text tokens, both shares weigh the same.
    rows = np.ones(len(frames), np.int64) if rows is None else rows
    all_frames = int(rows @ frames)
    positions = all_frames * tokens_per_frame + int(rows @ text)
    price = np.array([tokens_per_frame + positions // max(all_frames, 1), 1])
    keys = (_round(frames, FRAME_STEP) << 32) | _round(text, TEXT_STEP)
    keys, place = np.unique(keys, return_inverse=True)
    counts = np.bincount(place, weights=rows).astype(np.int64)
    sizes = np.stack([keys >> 32, keys & (2**32 - 1)], axis=1)
    levels = [_levels(sizes[:, axis], counts, _LEVELS[axis]) for axis in (0, 1)]
    coarse = np.stack([level[np.searchsorted(level, sizes[:, n])] for n, level in enumerate(levels)], axis=1)
    kinds, kind = np.unique(coarse, axis=0, return_inverse=True)
    candidates = np.stack(np.meshgrid(*levels, indexing="ij"), axis=-1).reshape(-1, 2)
    holds = (kinds[:, None] <= candidates[None]).all(axis=2)
    rows_of_kind = np.bincount(kind.reshape(-1), weights=counts).astype(np.int64)
    search = _Search(rows_of_kind, np.where(holds, candidates @ price, _NEVER))
    least = int(_WORTH * int(counts @ (sizes @ price)))
    return _shrink(sizes, candidates[search.run(max_shapes, least=least)], price)


def _round(values: np.ndarray, step: int) -> np.ndarray:
    """Rounds up to multiples of `step`. Up to FRAME_STEP frames stay exact, because each frame is costly."""
    up = np.maximum(-(-values // step), 1) * step
    return np.where((values <= step) & (step == FRAME_STEP), values, up).astype(np.int64)


def _levels(values: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """Ascending sizes that include the largest value: all of them, or of many the most useful ones."""
    unique, place = np.unique(values, return_inverse=True)
    if len(unique) <= most:
        return unique
    # A long row matters more than a short one, but there are more short rows.
    weight = np.cumsum(np.bincount(place.reshape(-1), weights=counts) * np.sqrt(unique))
    places = np.searchsorted(weight, weight[-1] * np.arange(1, most + 1) / most)
    return np.unique([*unique[np.minimum(places, len(unique) - 1)], unique[-1]])


def _shrink(sizes: np.ndarray, shapes: np.ndarray, price: np.ndarray) -> list[tuple[int, int]]:
    """Shrinks each shape to the rows that take it."""
    unassigned, result = np.ones(len(sizes), bool), []
    for shape in shapes[np.argsort(shapes @ price, kind="stable")]:
        taken = unassigned & (sizes <= shape).all(axis=1)
        if taken.any():
            result.append(tuple(sizes[taken].max(axis=0).tolist()))
        unassigned &= ~taken
    return sorted(set(result), key=lambda shape: (int(np.dot(shape, price)), shape))


class _Search:
    """Chooses among candidate shapes by their cost over all rows."""

    def __init__(self, counts: np.ndarray, costs: np.ndarray) -> None:
        """Holds rows of equal size as kinds.

        Args:
            counts: int64[kinds], rows of each kind.
            costs: int64[kinds, candidates], cost of a row of each kind in each candidate; _NEVER where it
                does not fit. The last candidate holds all rows.
        """
        self.counts = counts
        self.costs = costs

    def run(self, max_shapes: int, *, least: int) -> list[int]:
        """At most `max_shapes` candidates, each of which saves more than `least`."""
        chosen = [self.costs.shape[1] - 1]
        while len(chosen) < max_shapes + _SPARE:
            place, total = self._best(chosen)
            if total >= self._total(chosen):
                break
            chosen.append(place)
        while len(chosen) > 1:
            fewer = [chosen[:n] + chosen[n + 1 :] for n in range(len(chosen))]
            totals = [self._total(others) for others in fewer]
            weakest = int(np.argmin(totals))
            if len(chosen) <= max_shapes and totals[weakest] - self._total(chosen) > least:
                break
            chosen = self._settle(fewer[weakest])
        return chosen

    def _cost_of_kinds(self, chosen: list[int]) -> np.ndarray:
        """int64[kinds], cost of a row of each kind."""
        return self.costs[:, chosen].min(axis=1, initial=_NEVER)

    def _total(self, chosen: list[int]) -> int:
        return int(self.counts @ self._cost_of_kinds(chosen))

    def _best(self, others: list[int]) -> tuple[int, int]:
        """The candidate that saves most in addition to `others`, and the cost of all rows with it."""
        totals = self.counts @ np.minimum(self._cost_of_kinds(others)[:, None], self.costs)
        place = int(totals.argmin())
        return place, int(totals[place])

    def _settle(self, chosen: list[int]) -> list[int]:
        """Replaces each shape by the best one given the others, until none changes."""
        total = self._total(chosen)
        for _ in range(_ROUNDS):
            before = total
            for number in range(len(chosen)):
                others = chosen[:number] + chosen[number + 1 :]
                place, lower = self._best(others)
                if lower < total:
                    chosen, total = [*others[:number], place, *others[number:]], lower
            if total == before:
                break
        return chosen
