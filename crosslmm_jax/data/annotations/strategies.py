"""Sampling strategies of a mixture: which rows of a data set are used."""

import dataclasses
import math
import random
import re
from collections.abc import Callable

import numpy as np

from crosslmm_jax.errors import UserError

STRATEGIES = "all, first:N, first2:N, first3:N, first4:N, end:N or random:N, where N may be a percentage"
_STRATEGY = re.compile(r"(all)|(first[234]?|end|random):(\d+)(%?)")


@dataclasses.dataclass(frozen=True)
class Strategy:
    """`kind`: all, first, first2, first3, first4, end or random. N is `number`, in percent if `percent`."""

    kind: str
    number: int = 0
    percent: bool = False


@dataclasses.dataclass(frozen=True)
class Selection:
    """Rows from `start` up to `stop`, exclusive (None: no end); only those with a 1 in `chosen` if given."""

    start: int
    stop: int | None
    chosen: bytes | None = None  # as long as `stop`

    def __contains__(self, row: int) -> bool:
        within = self.start <= row and (self.stop is None or row < self.stop)
        return within and (self.chosen is None or bool(self.chosen[row]))

    def ends_before(self, row: int) -> bool:
        """Whether neither `row` nor any after it is selected."""
        return self.stop is not None and row >= self.stop


def parse_strategy(text: str, *, where: str) -> Strategy:
    """Parses a `sampling_strategy`. Raises UserError, naming `where`, for an unknown one."""
    match = _STRATEGY.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None:
        raise UserError(f"{where}: sampling_strategy is {text!r}; write {STRATEGIES}")
    if match[1]:
        return Strategy("all")
    number, percent = int(match[3]), bool(match[4])
    if percent and number > 100:
        raise UserError(f"{where}: sampling_strategy is {text!r}; at most 100%")
    return Strategy(match[2], number, percent)


def select(strategy: Strategy, count: Callable[[], int], *, seed: str) -> Selection:
    """The rows that a strategy selects.

    Args:
        strategy: the strategy.
        count: counts the rows of the data set; called once, and only where the strategy depends on it.
        seed: seed of the random strategy. The same seed selects the same rows on every machine.
    """
    if strategy.kind == "all":
        return Selection(0, None)
    number = strategy.number
    rows = count() if strategy.percent or strategy.kind in ("end", "random") else 0
    if strategy.percent:
        number = math.ceil(number * rows / 100)
    if strategy.kind == "end":
        return Selection(max(0, rows - number), None)
    if strategy.kind == "random":
        chosen = _draw(rows, number, seed)
        return Selection(0, len(chosen), chosen)
    block = int(strategy.kind.removeprefix("first") or 1) - 1
    return Selection(block * number, (block + 1) * number)


def _draw(population: int, number: int, seed: str) -> bytes:
    """Draws `number` of range(population) without replacement: the first steps of a Fisher-Yates shuffle.

    Python promises the same numbers in later versions only for `random()`, so `shuffle` is not used.

    Returns:
        1 at each number drawn, up to the last one.
    """
    generator = random.Random(seed)
    order = np.arange(population)
    for position in range(min(number, population)):
        other = position + int(generator.random() * (population - position))
        order[position], order[other] = order[other], order[position]
    drawn = np.zeros(population, np.uint8)
    drawn[order[:number]] = 1
    return np.trim_zeros(drawn, "b").tobytes()
