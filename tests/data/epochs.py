"""The length of an epoch of a schedule."""

import math

from crosslmm_jax.data.batching.schedule import Schedule


def epoch_steps(schedule: Schedule) -> int:
    """Steps in which each row is read at least once."""
    needed = [mix._first(1) for mix in schedule._mixes]
    cycles = [math.ceil(count / int(schedule._seen[-1, mix])) for mix, count in enumerate(needed)]
    return needed[0] if len(needed) == 1 else max(cycles) * len(schedule._pattern)
