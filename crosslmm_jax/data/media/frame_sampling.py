"""Chooses the frames of a video to read, by their times, so that variable frame rates are right too."""

import numpy as np
from numpy.typing import ArrayLike

from crosslmm_jax.config import SamplingConfig


def count_frames(*, num_frames: ArrayLike, duration: ArrayLike, sampling: SamplingConfig) -> np.ndarray:
    """Number of frames that `choose_frames` returns for whole videos, computed from their probes.

    Args:
        num_frames: int64[...], frames of each video.
        duration: float64[...], seconds; 0 means a still image, which is one frame.
        sampling: the rule that chooses frames.

    Returns:
        int64[...], in the shape of the arguments.
    """
    total, seconds = np.asarray(num_frames, np.int64), np.asarray(duration, np.float64)
    if sampling.policy == "uniform":
        count = np.full(total.shape, sampling.frames, np.int64)
    elif sampling.policy == "fps":
        every = np.maximum(1, np.ceil(seconds * sampling.fps - 1e-6))
        count = np.where(every <= sampling.frames, every, sampling.frames)
    elif sampling.policy == "llava":
        every = -(-total // _stride(total, seconds, sampling.fps))
        count = np.where((every > sampling.frames) | sampling.force_sample, sampling.frames, every)
    else:
        step = sampling.multiple
        count = np.maximum(1, (seconds + 1e-6) // step) * step
        # A video of fewer frames than the lower bound lowers it, as in VideoChat-Flash.
        low = np.where(total < sampling.min_frames, total // step * step, sampling.min_frames)
        count = np.maximum(np.minimum(count, sampling.max_frames), low)
    return np.where(seconds > 0, count, 1).astype(np.int64)


def _stride(total: np.ndarray | int, seconds: np.ndarray | float, fps: float) -> np.ndarray:
    """LLaVA's step in frames, but at least 1: theirs can be 0, which fails."""
    # 69 frames in 2.76 s are 25 per second. A rate slightly above would round a step of 12.5 up, not to even.
    rate = np.round(total / np.where(seconds > 0, seconds, 1), 6)
    return np.maximum(1, np.round(rate / fps)).astype(np.int64)


def choose_frames(
    times: np.ndarray, sampling: SamplingConfig, *, end: float, ticks_per_second: float
) -> np.ndarray:
    """Indices of the frames to read, ascending; an index may repeat.

    uniform: LLaVA's `linspace(0, total - 1, frames)` truncated, but in time: `sampling.frames` moments spread
        evenly from the first to the last frame, and the frame on display at each. At a constant frame rate
        both rules choose the same frames. Clips with fewer frames repeat them.
    llava: the rule of LLaVA-NeXT: every round(rate / fps)-th frame. Where that exceeds `sampling.frames`, or
        with `force_sample`, numpy's truncated linspace.
    dynamic_fps1: the rule of VideoChat-Flash: one frame per whole second, in multiples of `multiple`, within
        `min_frames` and `max_frames`. The frames are the middles of that many equal intervals. The last one
        repeats as padding.
    fps: the frame on display at 0, 1 / fps, 2 / fps, ... seconds; the uniform rule where that would exceed
        `sampling.frames`.

    Args:
        times: [frames], ascending presentation times in ticks.
        sampling: the rule.
        end: tick at which the display of the last frame ends.
        ticks_per_second: ticks of the time base per second.

    Returns:
        int64[chosen], with 1 <= chosen <= sampling.most_frames.
    """
    total = len(times)
    gap = (times[-1] - times[0]) / max(total - 1, 1)
    if sampling.policy in ("llava", "dynamic_fps1"):
        order = _by_number(total, (end - times[0]) / ticks_per_second, sampling)
        if np.abs(times - times[0] - np.arange(total) * gap).max() <= 1:
            return order
        # In integers, as below. Quotient and remainder apart, since their product could exceed 64 bits.
        step, rest = np.divmod(times[-1] - times[0], total - 1)
        moments = times[0] + step * order + rest * order // (total - 1)
        return np.searchsorted(times, moments, side="right") - 1
    if sampling.policy == "fps":
        step = ticks_per_second / sampling.fps
        count = max(1, int(np.ceil((end - times[0]) / step - 1e-6)))
        if count <= sampling.frames:
            # A time base of milliseconds rounds times, so one tick of slack is allowed. Frames of only a few
            # ticks are not rounded, and a tick would be too much for them.
            slack = 1 if gap >= 16 else 1e-6
            moments = times[0] + np.arange(count) * step + slack
            return np.searchsorted(times, moments, side="right") - 1
    steps = max(sampling.frames - 1, 1)
    order = np.arange(sampling.frames, dtype=np.int64)
    # In integers: a float linspace can fall just below the time of a frame and choose the one before.
    if np.abs(times - times[0] - np.arange(total) * gap).max() <= 1:  # constant but for rounding
        return (total - 1) * order // steps
    return np.searchsorted(times, times[0] + (times[-1] - times[0]) * order // steps, side="right") - 1


def _by_number(total: int, seconds: float, sampling: SamplingConfig) -> np.ndarray:
    """Indices that the rules of LLaVA and VideoChat-Flash choose at a constant frame rate."""
    count = int(count_frames(num_frames=total, duration=seconds, sampling=sampling))
    if sampling.policy == "llava":
        every = np.arange(0, total, int(_stride(total, seconds, sampling.fps)))
        if len(every) <= sampling.frames and not sampling.force_sample:
            return every
        return np.linspace(0, total - 1, sampling.frames, dtype=np.int64)
    edges = np.linspace(0, total, min(count, total) + 1).astype(np.int64)
    middles = (edges[:-1] + edges[1:] - 1) // 2
    return np.concatenate([middles, np.full(count - len(middles), middles[-1])])
