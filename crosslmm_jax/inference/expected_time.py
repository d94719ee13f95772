"""How long a long video takes: from its FLOPs beforehand, and from its decoding once that has begun.

Encoding and prefill follow from the model's FLOPs. How fast a file is decoded is not known before some of it
is, so the whole time is said after the first frames.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from jax.sharding import Mesh

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model import flops

# Share of a device's peak that encoding and prefill reach. One H200, 128 to 16,384 frames of the 2B model:
# 0.465 to 0.5 (docs/results/h200_long_video.md), whichever part has most of the work.
UTILISATION = 0.48
_TEXT = 64  # tokens of a prompt that are not frames; of no weight beside hundreds of these
_ENCODING = ("encoder", "pool", "projector")
# Decoding's rate counts after so many seconds and from this share of the frames on. Each thread decodes a
# GOP, so frames come in bursts of one GOP per thread: the time to the first burst says little.
_FIRST_S, _FIRST_SHARE = 2.0, 1 / 8


class ComputeSeconds(NamedTuple):
    """Time of the devices, without decoding."""

    encode: float
    prefill: float


def compute_seconds(config: ModelConfig, mesh: Mesh, num_frames: int) -> ComputeSeconds | None:
    """What `num_frames` frames take on these devices; None for devices whose peak is not known.

    All devices encode. Those that share the weights share a prefill, and groups of them compute the same.
    """
    peak = flops.peak_tflops(mesh.devices.flat[0].device_kind, config)
    if peak is None:
        return None
    rate = UTILISATION * peak * 1e12
    costs = flops.prefill(config, flops.Workload(num_frames, _TEXT))
    encoding = sum(costs[part].total for part in _ENCODING)
    prefill = flops.total(costs) - encoding
    return ComputeSeconds(encoding / (rate * mesh.size), prefill / (rate * mesh.shape["tensor"]))


class RemainingTime:
    """Says while a video is read how long its first answer will take."""

    def __init__(
        self, compute: Callable[[int], ComputeSeconds | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begins now.

        Args:
          compute: number of frames -> what `compute_seconds` says.
          clock: gives seconds.
        """
        self._compute, self._clock = compute, clock
        self._begun, self._done, self._said = clock(), 0, False

    def seconds(self, done: int, total: int) -> float | None:
        """Seconds until the first answer, or until the last frame where the devices' peak is not known.

        Args:
          done: frames that were decoded and given to the encoder.
          total: frames of the video.

        Returns:
          None while too few are done.
        """
        now = self._clock()
        if done < self._done:  # a damaged file is read again
            self._begun = now
        self._done = done
        if done < total and (now - self._begun < _FIRST_S or done < _FIRST_SHARE * total):
            return None
        compute = self._compute(total)
        return (now - self._begun) * (total - done) / max(done, 1) + (compute.prefill if compute else 0.0)

    def note(self, done: int, total: int) -> tuple[str, bool]:
        """The same as a text, empty if there is nothing to say; and whether it is of a new kind."""
        left = self.seconds(done, total)
        if left is None:
            return "", False
        new, self._said = done == total or not self._said, True
        if self._compute(total) is None:
            return "" if done == total else f"about {duration(left)} to the last frame", new
        return f"about {duration(left)} to the answer", new


def duration(seconds: float) -> str:
    """Such as "8 s" or "3 min 20 s"."""
    rounded = max(1, round(seconds)) if seconds < 60 else 10 * round(seconds / 10)
    minutes, rest = divmod(rounded, 60)
    parts = [f"{minutes} min"] * bool(minutes) + [f"{rest} s"] * bool(rest)
    return " ".join(parts)
