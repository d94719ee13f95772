"""Pictures of all formats and depths, still and animated, whatever their names say."""

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features
from video_files import SIZE, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.index import build_index
from crosslmm_jax.data.media import Media, from_bytes, probe, read_frames
from crosslmm_jax.errors import DataError

ONE = SamplingConfig(frames=1)
TEN_PER_SECOND = SamplingConfig(policy="fps", fps=10.0, frames=64)
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def write_png(path: Path, pixels: np.ndarray) -> Path:
    """A PNG of uint16[H, W, channels], grey, grey with alpha, RGB or RGBA. PIL cannot write them."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_scaled_to_8(tmp_path: Path, channels: int) -> None:
    ramp = np.linspace(0, 2**16 - 1, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE, 1)
    pixels = np.concatenate([np.roll(ramp, channel, 0) for channel in range(channels)], axis=2)
    pixels[..., channels - (channels % 2 == 0) :] = 2**16 - 1  # alpha
    path = write_png(tmp_path / "a.png", pixels)
    [frame] = read_frames(path, ONE, size=SIZE).frames
    colours = pixels[..., : max(1, channels - (channels % 2 == 0))] >> 8
    np.testing.assert_array_equal(frame, np.broadcast_to(colours, (SIZE, SIZE, 3)))
    assert probe(path).codec == "png"


def write_animation(path: Path, durations: list[int], kind: str = "", **options: Any) -> Path:
    pictures = [Image.new("RGB", (SIZE, SIZE), colour) for colour in COLOURS]
    more = {"save_all": True, "append_images": pictures[1:], "duration": durations, **options}
    pictures[0].save(path, kind or None, **more)
    return path


@pytest.mark.parametrize("kind", ["webp", "png", "avif", "gif"])
def test_an_animated_picture_is_a_video(tmp_path: Path, kind: str) -> None:
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "avif" else {}
    path = write_animation(tmp_path / f"a.{kind}", [100, 300, 100, 500], **options)
    info = probe(path)
    assert (info.num_frames, info.width, info.codec) == (4, SIZE, kind)
    assert (info.duration, info.fps) == (pytest.approx(1.0, abs=0.011), pytest.approx(4.0, abs=0.05))

    def colours(frames: np.ndarray) -> list[int]:
        far = np.abs(frames[:, None, SIZE // 2, SIZE // 2].astype(int) - COLOURS).sum(-1)
        assert far.min(1).max() < 20  # AVIF is not exact
        return far.argmin(1).tolist()

    clip = read_frames(path, TEN_PER_SECOND, size=SIZE)
    assert colours(clip.frames) == [0, 1, 1, 1, 2, 3, 3, 3, 3, 3]
    np.testing.assert_allclose(clip.times, [0, 0.1, 0.1, 0.1, 0.4, *[0.5] * 5], atol=1e-6)
    part = read_frames(path, SamplingConfig(frames=2), size=SIZE, bounds=(0.1, 0.5))
    assert colours(part.frames) == [1, 2] and part.duration == pytest.approx(0.4)
    in_memory = read_frames(from_bytes(path.read_bytes()), TEN_PER_SECOND, size=SIZE)
    np.testing.assert_array_equal(in_memory.frames, clip.frames)


@pytest.mark.parametrize("kind", ["webp", "png", "gif"])
def test_frames_without_a_duration_last_a_tenth_of_a_second(tmp_path: Path, kind: str) -> None:
    assert probe(write_animation(tmp_path / f"a.{kind}", [0, 10, 0, 40])).duration == pytest.approx(0.25)


def test_a_picture_for_old_readers_is_no_frame(tmp_path: Path) -> None:
    """An APNG may hold one for programs that know no animation."""
    path = write_animation(tmp_path / "a.png", [100] * 3, default_image=True)
    assert probe(path).num_frames == 3
    clip = read_frames(path, TEN_PER_SECOND, size=SIZE)
    assert clip.frames[:, 0, 0].tolist() == [list(colour) for colour in COLOURS[1:]]


@pytest.mark.parametrize("kind", ["webp", "png"])
def test_an_animation_that_ends_early_is_refused(tmp_path: Path, kind: str) -> None:
    path = write_animation(tmp_path / f"a.{kind}", [100] * 4)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    for read in (probe, lambda path: read_frames(path, TEN_PER_SECOND, size=SIZE)):
        with pytest.raises(DataError) as caught:
            read(path)
        assert caught.value.fault.reason in ("truncated", "corrupt")


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.avif", "a.mp4", "a.dat", "a"]
)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "avif", "gif"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    Image.new("RGB", (SIZE, SIZE), (90, 90, 90)).save(path, kind)
    info = probe(path)
    assert (info.codec, info.duration, info.num_frames) == (kind, 0.0, 1)
    [frame] = read_frames(path, ONE, size=SIZE).frames
    assert np.abs(frame.astype(int) - 90).max() <= 2


@pytest.mark.parametrize("name", ["a.jpg", "a.gif", "a.webp", "a.heic"])
def test_a_video_with_the_name_of_a_picture_is_a_video(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for suffix in (".mp4", ".mkv", ".avi"):
        path.write_bytes(write_video(tmp_path / f"b{suffix}", 12, codec="mpeg4").read_bytes())
        assert probe(path).num_frames == 12 and len(read_frames(path, TEN_PER_SECOND, size=SIZE).frames) == 5


def test_jpegs_in_a_row_are_a_video(tmp_path: Path) -> None:
    """The first bytes of such a file are those of a picture."""
    path = tmp_path / "a.mjpeg"
    with open(path, "wb") as file:
        for number in range(5):
            Image.new("RGB", (SIZE, SIZE), (40 * number,) * 3).save(file, "JPEG")
    assert probe(path).num_frames == 5
    frames = read_frames(path, SamplingConfig(frames=5), size=SIZE).frames
    assert np.abs(frames.mean((1, 2, 3)) - np.arange(0, 200, 40)).max() < 3


def test_rows_say_picture_or_video_and_the_file_must_agree(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_animation(tmp_path / "moving.webp", [100] * 4, lossless=True)
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "still.gif", "JPEG")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "still.avif")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    media = [
        {"video": "moving.webp"},
        {"image": "moving.webp"},
        {"video": "still.gif"},
        {"image": "still.avif"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps([row | {"conversations": talk} for row in media]))
    index = tmp_path / "index"
    report = build_index(str(tmp_path / "rows.json"), index, tokenizer=str(tokenizer_folder), quiet=True)
    assert (report.rows, report.bad) == (3, {"wrong_type": 1})
    [bad] = map(json.loads, (index / "bad.jsonl").read_text().splitlines())
    assert bad["row"] == 1 and "is a video; name it under video in its row" in bad["detail"]


HEIC = struct.pack(">I4s4sI", 24, b"ftyp", b"mif1", 0) + b"mif1heic" + bytes(40)


def test_heic_names_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(HEIC)
    for medium in (tmp_path / "a.jpg", Media(str(tmp_path / "a.jpg"), "a.heic", data=HEIC)):
        for read in (probe, lambda medium: read_frames(medium, ONE, size=SIZE)):
            with pytest.raises(DataError, match="is HEIC, .*`pip install pillow-heif`") as caught:
                read(medium)
            assert caught.value.fault.reason == "wrong_type"


def test_avif_without_its_decoder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a Pillow that a distribution built."""
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "a.jpg", "AVIF")
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with pytest.raises(
        DataError, match="is AVIF, which this Pillow was built without; `pip install"
    ) as caught:
        probe(tmp_path / "a.jpg")
    assert caught.value.fault.reason == "wrong_type"


def test_heic_with_the_plugin(tmp_path: Path) -> None:
    try:
        import pillow_heif
    except ImportError:
        pytest.skip("pillow-heif is not installed")
    pixels = np.full((48, 64, 3), 30, np.uint8)
    pixels[:24, 32:] = 220
    path, exif = tmp_path / "a.heic", Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(path, quality=90, exif=exif.tobytes())
    assert probe(path).codec == "heif" and probe(path).duration == 0
    [frame] = read_frames(path, ONE, size=SIZE).frames.astype(int)
    half = SIZE // 2
    # The bright quarter moves from the top right to the bottom right.
    assert frame[half + 2 :, half + 2 :].min() > 190 and frame[: half - 2].max() < 60
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_frames(path, ONE, size=SIZE)
