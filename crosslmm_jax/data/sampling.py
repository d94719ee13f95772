"""Which frames of a video are read, by their times, so that a variable frame rate is right too."""

import numpy as np

from crosslmm_jax.config import SamplingConfig


def choose_frames(
    times: np.ndarray, sampling: SamplingConfig, *, end: int, ticks_per_second: float
) -> np.ndarray:
    """Indices of the frames to read, ascending; an index may repeat.

    "uniform" is LLaVA's `linspace(0, total - 1, frames)` truncated, said in time: `sampling.frames` moments
    evenly spread from the first to the last frame, and for each the frame on display. At a constant frame
    rate both are the same frames. Clips with fewer frames repeat them.

    "fps" takes the frame on display at 0, 1 / fps, 2 / fps, ... seconds; where that would exceed
    `sampling.frames`, the uniform rule is used instead.

    Args:
        times: int64[frames], ascending, presentation times in ticks.
        sampling: the rule.
        end: tick at which the last frame leaves the display.
        ticks_per_second: length of a tick.

    Returns:
        int64[chosen], with 1 <= chosen <= sampling.frames.
    """
    total = len(times)
    gap = (times[-1] - times[0]) / max(total - 1, 1)
    if sampling.policy == "fps":
        step = ticks_per_second / sampling.fps
        count = max(1, int(np.ceil((end - times[0]) / step - 1e-6)))
        if count <= sampling.frames:
            # A time base of milliseconds rounds the times of frames; a tick forgives that. Where a frame
            # lasts only a few ticks nothing is rounded, and a tick would be too much.
            slack = 1 if gap >= 16 else 1e-6
            moments = times[0] + np.arange(count) * step + slack
            return np.searchsorted(times, moments, side="right") - 1
    steps = max(sampling.frames - 1, 1)
    order = np.arange(sampling.frames, dtype=np.int64)
    # Integers, since a float linspace can fall just below a frame's time and pick the one before.
    if np.abs(times - times[0] - np.arange(total) * gap).max() <= 1:  # constant but for rounding
        return (total - 1) * order // steps
    return np.searchsorted(times, times[0] + (times[-1] - times[0]) * order // steps, side="right") - 1
