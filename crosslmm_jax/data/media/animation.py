"""Animated pictures as videos: APNG, animated WebP and AVIF. PIL reads them from their beginning."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from crosslmm_jax.data.media.decoding import FrameStore
from crosslmm_jax.data.media.image import Resampling, resize, upright
from crosslmm_jax.data.media.locate import Deadline
from crosslmm_jax.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

TICK = 1e-3  # seconds; PIL gives milliseconds
_DEFAULT = 100  # ms; of a frame without a duration, as in ffmpeg's reader of GIFs


def is_animated(image: "Image.Image") -> bool:
    """Whether a picture has several frames."""
    return image.format in ("PNG", "WEBP", "AVIF") and bool(getattr(image, "is_animated", False))


def frame_times(image: "Image.Image", deadline: Deadline) -> tuple[np.ndarray, int]:
    """Times of the frames, int64[n], and the end of the last one in ticks. Decodes all frames."""
    durations = []
    for _ in _frames(image, deadline):
        durations.append(round(image.info.get("duration") or 0) or _DEFAULT)
    ends = np.cumsum(durations, dtype=np.int64)
    return ends - durations, int(ends[-1])


def read_animation(
    image: "Image.Image", wanted: np.ndarray, store: FrameStore, *, resampling: Resampling, deadline: Deadline
) -> None:  # fmt: skip
    """Stores the frames with the numbers `wanted`, ascending."""
    places = {number: place for place, number in enumerate(wanted.tolist())}
    for number in _frames(image, deadline):
        if number in places:
            place = places[number]
            store.put(place, place + 1, resize(upright(image), store.size, resampling))
            if place == len(wanted) - 1:
                break


def _frames(image: "Image.Image", deadline: Deadline) -> Iterator[int]:
    """Numbers of the frames in order; when one is given, `image` holds that frame."""
    # The picture for readers that know no animation comes first and is no part of it.
    first = int(getattr(image, "default_image", False))
    for number in range(image.n_frames - first):  # type: ignore[attr-defined]
        deadline.check()
        try:
            image.seek(first + number)
            image.load()
        except EOFError as error:
            detail = f"ends before its frame {number}; fetch or write the file again"
            raise DataError(deadline.path, "truncated", detail) from error
        yield number
