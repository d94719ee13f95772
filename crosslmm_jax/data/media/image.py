"""Still images, and `Clip`: the decoded frames of one image or video."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from crosslmm_jax.data.media import locate as media
from crosslmm_jax.data.media.locate import PathOrMedia
from crosslmm_jax.errors import DataError, UserError

if TYPE_CHECKING:
    from PIL import Image

Resampling = Literal["bicubic", "bilinear"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp",
    ".ogv", ".mjpeg", ".mjpg",
)  # fmt: skip
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # some other formats of PIL start other programs


@dataclasses.dataclass(frozen=True)
class Clip:
    """Decoded frames of one video or image.

    Attributes:
        frames: uint8[F, R, R, 3], RGB.
        times: float32[F], seconds since the first frame of the video.
        duration: seconds of the video, or of the part within the bounds; 0 for an image.
    """

    frames: np.ndarray
    times: np.ndarray
    duration: float


def is_image(path: PathOrMedia) -> bool:
    """Whether the suffix is that of a still image."""
    return media.suffix_of(path) in IMAGE_SUFFIXES


def holds_image(path: PathOrMedia) -> bool:
    """Whether a file is a still image: by its suffix or, if that is unknown, by its first bytes."""
    if media.suffix_of(path) in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        return is_image(path)
    with contextlib.suppress(OSError), media.open_file(path) as file:
        return media.suffix_by_content(file.read(16)) in IMAGE_SUFFIXES
    return False


def resize(image: "Image.Image", size: int, resampling: Resampling = "bicubic") -> np.ndarray:
    """uint8[size, size, 3] of an image: RGB, squeezed to a square as `SiglipImageProcessor` does."""
    from PIL import Image

    if image.mode != "RGB":  # `convert` always copies
        image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling[resampling.upper()])
    return np.asarray(image, np.uint8)


def read_image(path: PathOrMedia, size: int, resampling: Resampling = "bicubic") -> Clip:
    """A still image as one frame at time 0. Raises DataError when it is missing or damaged."""
    from PIL import ImageOps

    with open_image(path) as image:
        pixels = resize(ImageOps.exif_transpose(image), size, resampling)
    return Clip(pixels[None], np.zeros(1, np.float32), 0.0)


@contextlib.contextmanager
def open_image(path: PathOrMedia) -> "Iterator[Image.Image]":
    """Opens a still image with PIL. Every reading error inside becomes a DataError."""
    from PIL import Image, UnidentifiedImageError

    if media.kind_of(path) == "folder":
        raise DataError(path, "not_a_file", "is a folder; give the path of an image")
    try:
        with media.open_file(path) as file, Image.open(file, formats=_FORMATS) as image:
            media.check_pixels(path, *image.size)
            yield image
    except UserError:
        raise
    # PIL raises almost any exception on damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, Image.DecompressionBombError | MemoryError):
            reason = "too_large"
        elif isinstance(error, UnidentifiedImageError):
            reason = media.unreadable_reason(path, "picture")
            # PIL's message contains the address of a Python object.
            words = "it is not a picture" if reason == "wrong_type" else "damaged at its beginning"
        elif isinstance(error, PermissionError):
            reason = "other"
        else:
            reason = "truncated" if "truncated" in str(error) else "corrupt"
        raise DataError(path, reason, f"cannot be read as an image ({words}); replace the file") from error


def stack_clips(clips: Sequence[Clip], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8[F, size, size, 3] and times float32[F] of all media of a row, concatenated."""
    frames = [np.zeros((0, size, size, 3), np.uint8), *(clip.frames for clip in clips)]
    times = [np.zeros(0, np.float32), *(clip.times for clip in clips)]
    return np.concatenate(frames), np.concatenate(times)
