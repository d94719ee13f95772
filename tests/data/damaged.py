"""Makes damaged images and videos from small good ones, each with the reasons that may be reported for it."""

import dataclasses
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from video_files import write_sound, write_video

CUT = frozenset({"truncated", "corrupt"})
BROKEN = CUT | {"no_video", "zero_fps", "too_large", "wrong_type", "empty", "other"}
HUGE = 30_000  # pixels per side


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A path relative to the folder, the reasons that fit it, and whether reading it may also succeed."""

    reference: str
    reasons: frozenset[str]
    may_be_read: bool = False


def write_damaged(folder: Path, *, seed: int, cuts: int = 3, flips: int = 3) -> list[Damaged]:
    """Writes files below `folder`: `cuts` truncated and `flips` changed copies of every good file."""
    rng = random.Random(seed)
    made = []
    for path in write_good(folder / "good"):
        made += _cut_and_flip(folder, path, rng, cuts=cuts, flips=flips)
    return made + _hopeless(folder) + _not_a_file(folder) + _wrong_suffix(folder) + _absurd(folder)


def write_good(folder: Path) -> list[Path]:
    """Writes one small good file of each kind."""
    folder.mkdir(parents=True)
    fast = {"deadline": "realtime", "cpu-used": "8", "g": "9"}
    videos = [
        write_video(folder / "h264.mp4", 40, options={"g": "10"}),
        write_video(folder / "mpeg4.avi", 40, codec="mpeg4", options={"g": "8"}),
        write_video(folder / "vp9.webm", 40, codec="libvpx-vp9", options=fast),
        write_video(folder / "h264.ts", 40, options={"g": "10"}),
        write_video(folder / "h264.mkv", 40, options={"g": "10"}),
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    pictures = [folder / "noise.png", folder / "noise.jpg", folder / "noise.webp"]
    for path in pictures:
        Image.fromarray(pixels).save(path)
    frames = [Image.fromarray(np.roll(pixels, number, 1)) for number in range(6)]
    frames[0].save(folder / "noise.gif", save_all=True, append_images=frames[1:], duration=100)
    return [*videos, *pictures, folder / "noise.gif"]


def _cut_and_flip(folder: Path, path: Path, rng: random.Random, *, cuts: int, flips: int) -> list[Damaged]:
    """Copies truncated at random places, and copies with up to 20 random bytes changed."""
    content = path.read_bytes()
    made = []
    for number in range(cuts):
        name = f"cut{number}-{path.name}"
        (folder / name).write_bytes(content[: rng.randrange(1, len(content) * 9 // 10)])
        # Formats without a table of contents read well up to the cut.
        made.append(Damaged(name, BROKEN, may_be_read=path.suffix not in (".mp4", ".png")))
    for number in range(flips):
        flipped = bytearray(content)
        for _ in range(rng.randint(1, 20)):
            flipped[rng.randrange(len(flipped))] ^= rng.randint(1, 255)
        name = f"flip{number}-{path.name}"
        (folder / name).write_bytes(flipped)
        made.append(Damaged(name, BROKEN, may_be_read=True))
    return made


def _hopeless(folder: Path) -> list[Damaged]:
    """Files without bytes, of zeros, of text, and with sound only."""
    for suffix in (".mp4", ".png"):
        (folder / f"empty{suffix}").write_bytes(b"")
        (folder / f"zeros{suffix}").write_bytes(bytes(5000))
        (folder / f"text{suffix}").write_text("this is no video\n" * 50)
    write_sound(folder / "sound.mp4")
    return [
        *(Damaged(f"empty{suffix}", frozenset({"empty"})) for suffix in (".mp4", ".png")),
        *(Damaged(f"zeros{suffix}", frozenset({"wrong_type"})) for suffix in (".mp4", ".png")),
        *(Damaged(f"text{suffix}", frozenset({"wrong_type"})) for suffix in (".mp4", ".png")),
        Damaged("sound.mp4", frozenset({"no_video"})),
    ]


def _not_a_file(folder: Path) -> list[Damaged]:
    """A pipe without a writer, an empty folder, paths out of the folder, a missing file."""
    os.mkfifo(folder / "pipe.mp4")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.mp4").mkdir()
    (folder / "link.mp4").symlink_to("/etc/passwd")
    return [
        Damaged("pipe.mp4", frozenset({"not_a_file"})),
        Damaged("pipe.png", frozenset({"not_a_file"})),
        Damaged("folder.mp4", frozenset({"empty"})),
        Damaged("link.mp4", frozenset({"outside_root"})),
        Damaged("../good.mp4", frozenset({"outside_root"})),
        Damaged("/etc/passwd", frozenset({"outside_root"})),
        Damaged("missing.mp4", frozenset({"missing"})),
        Damaged("missing.png", frozenset({"missing"})),
    ]


def _wrong_suffix(folder: Path) -> list[Damaged]:
    """Files under the suffixes of others, which are read by their content."""
    good = folder / "good"
    (folder / "picture.mp4").write_bytes((good / "noise.jpg").read_bytes())
    (folder / "video.png").write_bytes((good / "h264.mp4").read_bytes())
    (folder / "matroska.mp4").write_bytes((good / "h264.mkv").read_bytes())
    return [
        Damaged("picture.mp4", frozenset(), may_be_read=True),
        Damaged("video.png", frozenset(), may_be_read=True),
        Damaged("matroska.mp4", frozenset(), may_be_read=True),
    ]


def _absurd(folder: Path) -> list[Damaged]:
    """Headers with no frame rate, or with 30,000 x 30,000 pixels."""
    good = folder / "good"
    (folder / "fps0.mp4").write_bytes(without_rate((good / "h264.mp4").read_bytes()))
    content = bytearray((good / "mpeg4.avi").read_bytes())
    header = content.index(b"avih") + 8  # microseconds per frame; then the size at 32
    struct.pack_into("<II", content, header + 32, HUGE, HUGE)
    format_block = content.index(b"strf") + 8
    struct.pack_into("<II", content, format_block + 4, HUGE, HUGE)
    (folder / "huge.avi").write_bytes(content)
    (folder / "huge.png").write_bytes(huge_picture((good / "noise.png").read_bytes()))
    return [
        Damaged("fps0.mp4", frozenset({"zero_fps"})),
        # The stream repeats the size, and a reader may use that one.
        Damaged("huge.avi", frozenset({"too_large"}), may_be_read=True),
        Damaged("huge.png", frozenset({"too_large"})),
    ]


def without_rate(mp4: bytes) -> bytes:
    """The same video with frames of duration 0."""
    content = bytearray(mp4)
    table = content.index(b"stts") + 8  # number of entries, then (frames, ticks per frame)
    for entry in range(struct.unpack_from(">I", content, table)[0]):
        struct.pack_into(">I", content, table + 8 + 8 * entry, 0)
    shifts = content.find(b"ctts")
    if shifts >= 0:
        content[shifts : shifts + 4] = b"free"
    return bytes(content)


def huge_picture(png: bytes) -> bytes:
    """The same image with a header of HUGE x HUGE pixels."""
    content = bytearray(png)
    struct.pack_into(">II", content, 16, HUGE, HUGE)
    struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    return bytes(content)
