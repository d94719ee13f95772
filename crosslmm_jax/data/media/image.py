"""Still images, and `Clip`: the decoded frames of one image or video."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from crosslmm_jax.data.media import locate as media
from crosslmm_jax.data.media.content import is_video, picture_suffix
from crosslmm_jax.data.media.locate import PathOrMedia
from crosslmm_jax.errors import DataError, UserError, first_line

if TYPE_CHECKING:
    from PIL import Image

Resampling = Literal["bicubic", "bilinear"]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif", ".heic", ".heif")
VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif", ".ts", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp",
    ".ogv", ".mjpeg", ".mjpg", ".m2ts", ".mts", ".m2v", ".mpe", ".vob", ".f4v", ".qt", ".asf", ".divx", ".rm",
    ".rmvb", ".mxf", ".dv", ".nut", ".y4m",
)  # fmt: skip
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "AVIF")  # some other formats of PIL start other programs
_JPEGS_IN_A_ROW = (".mjpeg", ".mjpg")  # a video that begins as its first picture does


@dataclasses.dataclass(frozen=True)
class Clip:
    """Decoded frames of one video or image.

    Attributes:
        frames: uint8[F, R, R, 3], RGB; no frames if their pixels were not kept.
        times: float32[F], seconds since the first frame of the video.
        duration: seconds of the video, or of the part within the bounds; 0 for an image.
        damaged: damaged frames of the whole file, counted or estimated (a long video) if damage was met.
    """

    frames: np.ndarray
    times: np.ndarray
    duration: float
    damaged: int = 0


def is_image(path: PathOrMedia) -> bool:
    """Whether the suffix is that of a still image."""
    return media.suffix_of(path) in IMAGE_SUFFIXES


def holds_image(path: PathOrMedia) -> bool:
    """Whether PIL reads a file: a still image, or an animated one of a format that ffmpeg does not read.

    Its first bytes tell, and the suffix only where they are of no known format.
    """
    try:
        head = media.head_of(path)
    except OSError:
        return False
    found = picture_suffix(head)
    if found == ".gif":
        return not _is_moving_gif(path)
    if found == ".jpg":
        return media.suffix_of(path) not in _JPEGS_IN_A_ROW
    return bool(found) or (is_image(path) and not is_video(head))


def _is_moving_gif(path: PathOrMedia) -> bool:
    """Whether a GIF has several frames, or cannot be read."""
    try:
        with open_image(path) as image:
            return image.is_animated  # type: ignore[attr-defined]
    except DataError:
        return True  # ffmpeg names the fault


def upright(image: "Image.Image") -> "Image.Image":
    """The image turned and mirrored as its EXIF data say."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def resize(image: "Image.Image", size: int, resampling: Resampling = "bicubic") -> np.ndarray:
    """uint8[size, size, 3] of an image: RGB, squeezed to a square as `SiglipImageProcessor` does."""
    from PIL import Image

    if image.mode != "RGB":  # `convert` always copies
        image = _to_8_bits(image).convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling[resampling.upper()])
    return np.asarray(image, np.uint8)


def _to_8_bits(image: "Image.Image") -> "Image.Image":
    """A grey image of 16 bits scaled, as PIL does with colours; its `convert` would clip all above 255."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))


def read_image(path: PathOrMedia, size: int, resampling: Resampling = "bicubic") -> Clip:
    """A still image as one frame at time 0. Raises DataError when it is missing or damaged."""
    with open_image(path) as image:
        return still_clip(image, size, resampling)


def still_clip(image: "Image.Image", size: int, resampling: Resampling) -> Clip:
    """An open image as one frame at time 0."""
    return Clip(resize(upright(image), size, resampling)[None], np.zeros(1, np.float32), 0.0)


@contextlib.contextmanager
def open_image(path: PathOrMedia) -> "Iterator[Image.Image]":
    """Opens a still image with PIL. Every reading error inside becomes a DataError."""
    from PIL import Image, UnidentifiedImageError

    if media.kind_of(path) == "folder":
        raise DataError(path, "not_a_file", "is a folder; give the path of an image")
    try:
        formats = _formats_for(path)
        with media.open_file(path) as file, Image.open(file, formats=formats) as image:
            media.check_pixels(path, *image.size)
            yield image
    except UserError:
        raise
    # PIL raises almost any exception on damaged files: SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        words = first_line(error)
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


def _formats_for(path: PathOrMedia) -> tuple[str, ...]:
    """PIL's formats that may read a file. Raises DataError where PIL lacks the decoder of its format."""
    from PIL import features

    found = picture_suffix(media.head_of(path))
    if found == ".avif" and not features.check("avif"):
        detail = "is AVIF, which this Pillow was built without; `pip install --force-reinstall pillow`"
        raise DataError(path, "wrong_type", detail)
    if found != ".heic":
        return _FORMATS
    try:
        import pillow_heif  # type: ignore[import-not-found]
    except ImportError as error:
        detail = "is HEIC, which Pillow reads with a plugin; `pip install pillow-heif`, or convert the file"
        raise DataError(path, "wrong_type", detail) from error
    pillow_heif.register_heif_opener()
    return ("HEIF",)


def stack_clips(clips: Sequence[Clip], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8[F, size, size, 3] and times float32[F] of all media of a row, concatenated."""
    frames = [np.zeros((0, size, size, 3), np.uint8), *(clip.frames for clip in clips)]
    times = [np.zeros(0, np.float32), *(clip.times for clip in clips)]
    return np.concatenate(frames), np.concatenate(times)
