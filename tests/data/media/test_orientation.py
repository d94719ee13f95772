"""All eight ways to turn and mirror a picture or a video, pixel by pixel."""

import math
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_files import SIZE, set_matrix, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.orientation import Orientation, of_exif, of_matrix
from crosslmm_jax.data.media.video import probe, read_frames

ONE = SamplingConfig(frames=1)
UNIT = 1 << 16

# EXIF value -> display matrix (a, b, c, d), and what is shown of the stored array.
WAYS: dict[int, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    1: ((1, 0, 0, 1), lambda stored: stored),
    2: ((-1, 0, 0, 1), lambda stored: stored[:, ::-1]),
    3: ((-1, 0, 0, -1), lambda stored: np.rot90(stored, 2)),
    4: ((1, 0, 0, -1), lambda stored: stored[::-1]),
    5: ((0, 1, 1, 0), lambda stored: stored.swapaxes(0, 1)),
    6: ((0, 1, -1, 0), lambda stored: np.rot90(stored, -1)),
    7: ((0, -1, -1, 0), lambda stored: np.rot90(stored, 2).swapaxes(0, 1)),
    8: ((0, -1, 1, 0), lambda stored: np.rot90(stored, 1)),
}


def square(shown: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(shown).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, np.ndarray]:
    """An mp4, and its second frame as stored."""
    path = write_video(tmp_path_factory.mktemp("video") / "a.mp4", 2, width=32, height=20)
    with av.open(str(path)) as container:
        *_, frame = container.decode(video=0)
        return path.read_bytes(), frame.to_ndarray(format="rgb24")


def read_turned(path: Path, content: bytes, matrix: tuple[float, ...]) -> np.ndarray:
    path.write_bytes(content)
    a, b, c, d = (round(value * UNIT) for value in matrix)
    set_matrix(path, [a, b, 0, c, d, 0, 640 * UNIT, -9 * UNIT, 1 << 30])
    return read_frames(path, SamplingConfig(frames=2), size=SIZE).frames[1]


@pytest.mark.parametrize("way", WAYS)
def test_a_display_matrix_is_applied_whole(tmp_path: Path, video: tuple[bytes, np.ndarray], way: int) -> None:
    content, stored = video
    matrix, show = WAYS[way]
    expected = square(np.ascontiguousarray(show(stored)))
    path = tmp_path / "a.mp4"
    np.testing.assert_array_equal(read_turned(path, content, matrix), expected)
    info = probe(path)
    turned = np.rot90(stored, info.rotation // 90)
    np.testing.assert_array_equal(turned[:, ::-1] if info.mirrored else turned, show(stored))
    scaled = tuple(factor * value for factor, value in zip((2, 0.5, 0.5, 2), matrix, strict=True))
    np.testing.assert_array_equal(read_turned(path, content, scaled), expected)


def test_an_angle_between_two_orientations_counts_as_the_nearer(
    tmp_path: Path, video: tuple[bytes, np.ndarray]
) -> None:
    content, stored = video
    for degrees, way in ((30, 1), (60, 6), (200, 3), (290, 8)):
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        found = read_turned(tmp_path / "a.mp4", content, (cosine, sine, -sine, cosine))
        np.testing.assert_array_equal(found, square(np.ascontiguousarray(WAYS[way][1](stored))))
    nothing = read_turned(tmp_path / "a.mp4", content, (0, 0, 0, 0))
    np.testing.assert_array_equal(nothing, square(stored))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".avif", ".heic"])
@pytest.mark.parametrize("way", WAYS)
def test_a_picture_is_turned_and_mirrored(tmp_path: Path, suffix: str, way: int) -> None:
    """By EXIF data; in AVIF and HEIC by the boxes `irot` and `imir`, which PIL writes in their place."""
    options = {"lossless": True, "quality": 95}
    if suffix == ".heic":
        pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
        pillow_heif.register_heif_opener()
        options = {"quality": 95, "chroma": 444}
    pixels = np.random.default_rng(way).integers(0, 256, (20, 32, 3), np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path, **options)
    stored = np.asarray(Image.open(path).convert("RGB"))
    exif = Image.Exif()
    exif[0x0112] = way
    Image.fromarray(pixels).save(path, exif=exif.tobytes(), **options)
    assert (b"imir" in path.read_bytes()) == (suffix in (".avif", ".heic") and way in (2, 4, 5, 7))
    show = WAYS[way][1]
    found = read_frames(path, ONE, size=SIZE).frames[0]
    np.testing.assert_array_equal(found, square(np.ascontiguousarray(show(stored))))
    info = probe(path)
    if suffix == ".heic":  # libheif has turned the picture already
        assert (info.height, info.width, info.rotation, info.mirrored) == (*show(stored).shape[:2], 0, False)
        return
    turned = np.rot90(stored, info.rotation // 90)
    np.testing.assert_array_equal(turned[:, ::-1] if info.mirrored else turned, show(stored))


def test_unknown_orientations_say_nothing() -> None:
    for value in (None, 0, 9, "6", b"x"):
        assert of_exif(value) == Orientation()
    assert of_matrix([0, 0, 0, 0, 0, 0, 0, 0, 1 << 30]) == Orientation()
