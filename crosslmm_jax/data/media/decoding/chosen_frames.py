"""Which frames of a video are read: by the sampling rule and bounds, or the keyframes nearest to those."""

import dataclasses

import numpy as np

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.frame_sampling import choose_frames
from crosslmm_jax.data.media.image import Clip
from crosslmm_jax.data.media.locate import PathOrMedia
from crosslmm_jax.data.media.packet_index import PacketIndex
from crosslmm_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class ChosenFrames:
    """The frames to read.

    Attributes:
        frames: int64[n], positions in the video without repeats, ascending in time.
        repeats: int64[F], for each frame of the clip its position in `frames`; ascending.
        seconds: float32[F], times of the clip's frames since the first frame of the video.
        duration: seconds of the video, or of the part within the bounds.
    """

    frames: np.ndarray
    repeats: np.ndarray
    seconds: np.ndarray
    duration: float

    def only(self, numbers: np.ndarray | None) -> "ChosenFrames":
        """These frames of the clip alone; None: all."""
        if numbers is None:
            return self
        wanted, repeats = np.unique(self.repeats[numbers], return_inverse=True)
        return dataclasses.replace(
            self, frames=self.frames[wanted], repeats=repeats, seconds=self.seconds[numbers]
        )

    def clip(self, images: np.ndarray, *, damaged: int = 0) -> Clip:
        """The clip with these pixels, uint8[F, R, R, 3]."""
        return Clip(images, self.seconds, self.duration, damaged)


def nearest_keyframes(
    chosen: ChosenFrames, index: PacketIndex, shown: np.ndarray, bounds: tuple[float, float] | None
) -> ChosenFrames:
    """The keyframes nearest to the chosen times, within the bounds if it can be; `shown` are displayed."""
    first = int(index.times[shown].min())
    places = np.flatnonzero(index.keyframes[shown])
    if not len(places):
        return chosen
    places = places[np.argsort(index.times[shown[places]], kind="stable")]
    seconds = (index.times[shown[places]] - first) * index.tick
    if bounds is not None and (inside := (seconds >= bounds[0]) & (seconds < bounds[1])).any():
        places, seconds = places[inside], seconds[inside]
    after = np.minimum(np.searchsorted(seconds, chosen.seconds), len(places) - 1)
    before = np.maximum(after - 1, 0)
    nearer = chosen.seconds - seconds[before] <= seconds[after] - chosen.seconds
    taken = np.unique(np.where(nearer, before, after))
    return dataclasses.replace(
        chosen, frames=places[taken], repeats=np.arange(len(taken)), seconds=seconds[taken].astype(np.float32)
    )


def choose_within(
    times: np.ndarray, sampling: SamplingConfig, *, end: float, tick: float,
    bounds: tuple[float, float] | None, path: PathOrMedia,
) -> ChosenFrames:  # fmt: skip
    """Applies bounds and sampling to the times (ticks, in any order) of the frames of a video."""
    order = np.argsort(times, kind="stable")
    times = times[order]
    first = int(times[0])
    if bounds is not None:
        seconds = (times - first) * tick
        inside = (seconds >= bounds[0]) & (seconds < bounds[1])
        if inside.any():
            order, times = order[inside], times[inside]
        elif bounds[0] < (end - first) * tick:  # between two frames: the frame on display
            number = np.searchsorted(seconds, bounds[0], side="right") - 1
            order, times = order[number : number + 1], np.array([first + bounds[0] / tick])
        else:
            detail = f"no frames between {bounds[0]} and {bounds[1]} seconds; correct start and end"
            raise DataError(path, "clip_times", detail)
        end = min(end, first + bounds[1] / tick)
    chosen = choose_frames(times, sampling, end=end, ticks_per_second=1 / tick)
    numbers, repeats = np.unique(chosen, return_inverse=True)
    return ChosenFrames(
        frames=order[numbers],
        repeats=repeats,
        seconds=((times[chosen] - first) * tick).astype(np.float32),
        duration=float(end - times[0]) * tick,
    )
