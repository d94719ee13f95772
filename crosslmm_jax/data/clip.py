"""Decoded frames of one image or video, and still images."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from crosslmm_jax.errors import UserError

Resampling = Literal["bicubic", "bilinear"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Clip:
    """Decoded frames of one video or image.

    Attributes:
        frames: uint8[F, R, R, 3], RGB.
        times: float32[F], seconds since the first frame of the video.
        duration: of the video (or of the part within the bounds), seconds; 0 for an image.
    """

    frames: np.ndarray
    times: np.ndarray
    duration: float


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the name is that of a still image."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def resize(image: Any, size: int, resampling: Resampling = "bicubic") -> np.ndarray:
    """uint8[size, size, 3] of a PIL image: RGB, squeezed to a square, as `SiglipImageProcessor` does."""
    from PIL import Image

    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling[resampling.upper()])
    return np.asarray(image, np.uint8)


def read_image(path: str | os.PathLike[str], size: int, resampling: Resampling = "bicubic") -> Clip:
    """A still image as one frame at time 0. Raises UserError when it is missing or damaged."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; give the path of an image")
    try:
        with Image.open(path) as image:
            pixels = resize(ImageOps.exif_transpose(image), size, resampling)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace the file") from error
    return Clip(pixels[None], np.zeros(1, np.float32), 0.0)


def stack_clips(clips: Sequence[Clip], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8[F, size, size, 3] and times float32[F] of all media of a row, one after the other."""
    frames = [np.zeros((0, size, size, 3), np.uint8), *(clip.frames for clip in clips)]
    times = [np.zeros(0, np.float32), *(clip.times for clip in clips)]
    return np.concatenate(frames), np.concatenate(times)
