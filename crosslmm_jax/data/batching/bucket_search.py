"""The few shapes that rows of known lengths are padded to with the least waste.

A row may take any shape that holds it and takes the cheapest. Many shapes are placed one by one, each where
it saves the most; then the least useful goes, again and again, and the others move to where they are best.
All sums are of integers, so that every host comes to the same shapes whatever its processor.
"""

import numpy as np

TEXT_STEP = 16  # tokens; text sizes are multiples of it
FRAME_STEP = 4  # frames; likewise, above 4
_LEVELS = (30, 40)  # sizes that are tried, of frames and of text
_SPARE = 16  # shapes that are placed beyond those that may stay
_WORTH = 0.002  # of the work without padding: a shape that saves less goes
_ROUNDS = 10  # of moving all shapes; they settle after a few
_NEVER = 10**9  # what a row would pay for a shape that does not hold it


def choose_shapes(
    frames: np.ndarray, text: np.ndarray, *, max_shapes: int, tokens_per_frame: int
) -> list[tuple[int, int]]:
    """At most `max_shapes` pairs (frames, text) that hold every row with little padding, cheapest first.

    What is saved is the sum of two shares: padded frames over all frames, and padded positions of the decoder
    (frames times C, and text) over all positions.

    Args:
        frames: int64[rows].
        text: int64[rows], tokens that are not visual.
        max_shapes: most that there may be.
        tokens_per_frame: C.
    """
    # With this price of a frame, in tokens of text, a shape saves alike in both shares.
    positions = int(frames.sum()) * tokens_per_frame + int(text.sum())
    price = np.array([tokens_per_frame + positions // max(int(frames.sum()), 1), 1])
    keys = (_round(frames, FRAME_STEP) << 32) | _round(text, TEXT_STEP)
    keys, counts = np.unique(keys, return_counts=True)
    sizes = np.stack([keys >> 32, keys & (2**32 - 1)], axis=1)
    levels = [_levels(sizes[:, axis], counts, _LEVELS[axis]) for axis in (0, 1)]
    coarse = np.stack([level[np.searchsorted(level, sizes[:, n])] for n, level in enumerate(levels)], axis=1)
    kinds, kind = np.unique(coarse, axis=0, return_inverse=True)
    candidates = np.stack(np.meshgrid(*levels, indexing="ij"), axis=-1).reshape(-1, 2)
    holds = (kinds[:, None] <= candidates[None]).all(axis=2)
    rows = np.bincount(kind.reshape(-1), weights=counts).astype(np.int64)
    search = _Search(rows, np.where(holds, candidates @ price, _NEVER))
    least = int(_WORTH * int(counts @ (sizes @ price)))
    return _shrink(sizes, candidates[search.run(max_shapes, least=least)], price)


def _round(values: np.ndarray, step: int) -> np.ndarray:
    """Up to multiples of `step`; few frames stay as they are, for each of them is dear."""
    up = np.maximum(-(-values // step), 1) * step
    return np.where((values <= step) & (step == FRAME_STEP), values, up).astype(np.int64)


def _levels(values: np.ndarray, counts: np.ndarray, most: int) -> np.ndarray:
    """Ascending sizes, the largest value the last: all, or where there are many, those that matter most."""
    unique, place = np.unique(values, return_inverse=True)
    if len(unique) <= most:
        return unique
    # Long rows matter more each, short ones are more.
    weight = np.cumsum(np.bincount(place.reshape(-1), weights=counts) * np.sqrt(unique))
    places = np.searchsorted(weight, weight[-1] * np.arange(1, most + 1) / most)
    return np.unique([*unique[np.minimum(places, len(unique) - 1)], unique[-1]])


def _shrink(sizes: np.ndarray, shapes: np.ndarray, price: np.ndarray) -> list[tuple[int, int]]:
    """Each shape as small as the rows that take it allow."""
    left, result = np.ones(len(sizes), bool), []
    for shape in shapes[np.argsort(shapes @ price, kind="stable")]:
        taken = left & (sizes <= shape).all(axis=1)
        if taken.any():
            result.append(tuple(sizes[taken].max(axis=0).tolist()))
        left &= ~taken
    return sorted(set(result), key=lambda shape: (int(np.dot(shape, price)), shape))


class _Search:
    """Chooses among candidates by what rows pay for them."""

    def __init__(self, counts: np.ndarray, offers: np.ndarray) -> None:
        """Takes the rows of each kind, int64[kinds], and what a row of a kind pays for each candidate.

        `offers` is int64[kinds, candidates], _NEVER where the candidate does not hold the row; the last
        candidate holds all.
        """
        self.counts = counts
        self.offers = offers

    def run(self, max_shapes: int, *, least: int) -> list[int]:
        """Candidates, at most `max_shapes`, of which each saves more than `least`."""
        chosen = [self.offers.shape[1] - 1]
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

    def _paid(self, chosen: list[int]) -> np.ndarray:
        """int64[kinds], what a row of each kind pays."""
        return self.offers[:, chosen].min(axis=1, initial=_NEVER)

    def _total(self, chosen: list[int]) -> int:
        return int(self.counts @ self._paid(chosen))

    def _best(self, others: list[int]) -> tuple[int, int]:
        """The candidate that is worth the most beside `others`, and what all rows pay then."""
        totals = self.counts @ np.minimum(self._paid(others)[:, None], self.offers)
        place = int(totals.argmin())
        return place, int(totals[place])

    def _settle(self, chosen: list[int]) -> list[int]:
        """Moves each shape to its best place given the others, until none moves."""
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
