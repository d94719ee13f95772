"""A zoo of small videos: every codec in every container that the installed PyAV writes, and odd ones.

    python tests/data/zoo.py FOLDER

The pictures are 64 x 64 where the codec allows it, with texture that moves, so that a frame which is built on
a wrong one differs.
"""

import functools
import random
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np
from av.codec import Codec, codecs_available
from video_files import packet_spans, transport_packets

SIDE, FRAMES = 64, 40
# Containers into which ffmpeg writes any codec, but reads only some back.
BROADCAST = ("ts", "mpg", "vob")
BROADCAST_CODECS = ("libx264", "libx265", "mpeg1video", "mpeg2video", "mpeg4")
SIZES = {"h261": (176, 144), "h263": (176, 144), "dvvideo": (720, 576)}
PIXELS = {"mjpeg": "yuvj420p", "ljpeg": "yuvj420p", "amv": "yuvj420p", "zmbv": "bgr0"}
# Suffix of a container -> ffmpeg's name where the suffix does not say it.
CONTAINERS = {
    "mp4": None, "mov": None, "mkv": None, "webm": None, "avi": None, "ts": None, "mpg": "mpeg", "vob": "vob",
    "flv": None, "wmv": "asf", "ogv": "ogg", "nut": None, "rm": None, "mxf": None, "3gp": None, "ivf": None,
    "h264": None, "hevc": "hevc", "m4v": None, "m2v": "mpeg2video", "mjpeg": None, "y4m": "yuv4mpegpipe",
    "wtv": None, "f4v": None, "obu": "obu", "h263": None, "dv": None, "gif": None,
}  # fmt: skip
# Encoders of the same codec under another name, those that need a device, and those of no video that plays.
LEFT_OUT = ("_qsv", "_nvenc", "_v4l2m2m", "_amf", "vnull", "wrapped_avframe", "a64multi", "apng", "webp")
SAME = ("h264", "hevc", "vp8", "vp9", "av1", "prores_aw")
QUICK = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=none"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "13", "svtav1-params": "lp=1"},
}
_X265 = "log-level=none:pools=none:keyint=8:min-keyint=8:scenecut=0:"
STRUCTURES: dict[str, tuple[str, dict[str, str]]] = {
    "h264-closed": ("libx264", {"g": "8", "bf": "0"}),
    "h264-open": ("libx264", {"g": "9", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "h264-pyramid": ("libx264", {"g": "11", "bf": "4", "x264-params": "b-pyramid=2:scenecut=0"}),
    "h264-refresh": ("libx264", {"g": "10", "x264-params": "intra-refresh=1:scenecut=0"}),
    "h264-one": ("libx264", {"g": "250"}),
    "h264-every": ("libx264", {"g": "1"}),
    "h264-interlaced": ("libx264", {"g": "9", "bf": "2", "x264-params": "tff=1", "flags": "+ildct+ilme"}),
    "h264-slices": ("libx264", {"g": "9", "slices": "4"}),
    "hevc-open": ("libx265", {"x265-params": _X265 + "bframes=3:open-gop=1"}),
    "hevc-closed": ("libx265", {"x265-params": _X265 + "bframes=2:open-gop=0"}),
    "hevc-refresh": ("libx265", {"x265-params": _X265 + "intra-refresh=1:bframes=0"}),
    "mpeg4-b": ("mpeg4", {"g": "7", "bf": "2"}),
    "mpeg4-no-b": ("mpeg4", {"g": "7"}),
    "mpeg2-open": ("mpeg2video", {"g": "9", "bf": "2"}),
    "mpeg2-closed": ("mpeg2video", {"g": "9", "bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"}),
    "mpeg2-interlaced": ("mpeg2video", {"g": "9", "bf": "2", "flags": "+ildct+ilme"}),
    "mpeg1-open": ("mpeg1video", {"g": "8", "bf": "2"}),
    "vp8-hidden": ("libvpx", {"g": "9", "cpu-used": "5", "lag-in-frames": "10", "auto-alt-ref": "1"}),
    "vp9-hidden": ("libvpx-vp9", {"g": "9", "cpu-used": "5", "lag-in-frames": "10", "auto-alt-ref": "1"}),
    "av1": ("libsvtav1", {"preset": "12", "g": "9", "svtav1-params": "lp=1"}),
}
_STRUCTURED = (
    "mp4", "mkv", "webm", "avi", "ts", "mpg", "flv", "wmv", "nut", "mxf", "h264", "hevc", "m2v", "m4v", "obu",
)  # fmt: skip


class Animal(NamedTuple):
    """A file of the zoo.

    Attributes:
        path: the file.
        kind: what it shares with others, for the report.
        damaged: bytes of it were changed.
    """

    path: Path
    kind: str
    damaged: bool = False


@functools.cache
def pictures(width: int, height: int, pixels: str, first: int) -> list[av.VideoFrame]:
    """Frames `first`, `first` + 1, ... in an encoder's format of pixels."""
    texture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    made = []
    for number in range(first, first + FRAMES):
        image = np.roll(texture, (number, 2 * number), (0, 1))
        image[:, 3 * number % SIDE : 3 * number % SIDE + 4] = (255, 0, 5 * number % 256)
        image = np.tile(image, (height // SIDE + 1, width // SIDE + 1, 1))[:height, :width]
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        made.append(frame.reformat(format=pixels))
    return made


def write(
    path: Path, codec: str, options: dict[str, str], *, first: int = 0,
    rate: Fraction | int = 25, ticks: Sequence[int] | None = None, rotation: int = 0,
    mux: dict[str, str] | None = None,
) -> bool:  # fmt: skip
    """Writes a video whose frames are numbered from `first`; False where ffmpeg cannot.

    `ticks` are the times in milliseconds, if they are not those of `rate`.
    """
    width, height = SIZES.get(codec, (SIDE, SIDE))
    formats = [one.name for one in Codec(codec, "w").video_formats or ()]
    pixels = PIXELS.get(codec) or ("yuv420p" if "yuv420p" in formats or not formats else formats[0])
    suffix = path.suffix[1:]
    try:
        options_of_file = {"fflags": "+bitexact"} | (mux or {})
        with av.open(
            str(path), "w", format=CONTAINERS[suffix], container_options=options_of_file
        ) as container:
            stream: Any = container.add_stream(codec, rate=rate, options=dict(options))
            stream.width, stream.height, stream.pix_fmt = width, height, pixels
            if rotation:
                stream.set_display_rotation(rotation)
            stream.codec_context.thread_count = 1
            base = Fraction(1, 1000) if ticks is not None else 1 / Fraction(rate)
            stream.codec_context.time_base = base
            for number, frame in enumerate(pictures(width, height, pixels, first)):
                frame.pts, frame.time_base = ticks[number] if ticks is not None else number, base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError, OSError):
        path.unlink(missing_ok=True)
        return False
    return True


def encoders() -> list[str]:
    """All encoders of moving pictures."""
    found = []
    for name in sorted(codecs_available):
        if name in SAME or any(part in name for part in LEFT_OUT):
            continue
        try:
            codec = Codec(name, "w")
        except ValueError:
            continue
        if codec.type == "video":
            found.append(name)
    return found


def good_animals(folder: Path) -> Iterator[Animal]:
    """Writes all files without damage."""
    yield from _codecs(folder)
    yield from _structures(folder)
    yield from _rates(folder)
    yield from _joined(folder)
    yield from _without_sync_table(folder)


def _codecs(folder: Path) -> Iterator[Animal]:
    for codec in encoders():
        for suffix in CONTAINERS:
            path = folder / f"{codec}.{suffix}"
            if suffix in BROADCAST and codec not in BROADCAST_CODECS:
                continue
            if write(path, codec, {"g": "9"} | QUICK.get(codec, {})):
                yield Animal(path, "codec and container")


def _structures(folder: Path) -> Iterator[Animal]:
    for name, (codec, options) in STRUCTURES.items():
        for suffix in _STRUCTURED:
            path = folder / f"{name}.{suffix}"
            if suffix in BROADCAST and codec not in BROADCAST_CODECS:
                continue
            if write(path, codec, options):
                yield Animal(path, "structure of GOPs")
        for place, flags in enumerate(("frag_keyframe+empty_moov", "faststart", "negative_cts_offsets")):
            path = folder / f"{name}-{place}.mp4"
            if write(path, codec, options, mux={"movflags": flags}):
                yield Animal(path, "tables of mp4")


def _rates(folder: Path) -> Iterator[Animal]:
    uneven = np.cumsum([0, *np.random.default_rng(1).integers(20, 400, FRAMES - 1)]).tolist()
    for name in ("h264-open", "h264-refresh", "mpeg4-no-b", "vp9-hidden"):
        codec, options = STRUCTURES[name]
        for suffix in ("mp4", "mkv", "ts", "flv", "avi", "nut"):
            if suffix in BROADCAST and codec not in BROADCAST_CODECS:
                continue
            for label, rate in {"10": 10, "ntsc": Fraction(30000, 1001), "60": 60}.items():
                path = folder / f"rate-{label}-{name}.{suffix}"
                if write(path, codec, options, rate=rate):
                    yield Animal(path, "rate")
            path = folder / f"uneven-{name}.{suffix}"
            if suffix != "avi" and write(path, codec, options, ticks=uneven):
                yield Animal(path, "uneven rate")
        for rotation in (90, 180, 270):
            for suffix in ("mp4", "mov", "mkv"):
                path = folder / f"turned-{rotation}-{name}.{suffix}"
                if write(path, codec, options, rotation=rotation):
                    yield Animal(path, "orientation")


def _joined(folder: Path) -> Iterator[Animal]:
    """Files whose timestamps start again: two files, one after the other."""
    fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    for name in ("h264-open", "h264-closed", "h264-refresh", "mpeg2-open", "mpeg4-b", "hevc-open"):
        codec, options = STRUCTURES[name]
        for suffix in ("ts", "mpg", "h264", "m2v", "hevc", "mp4"):
            mux = fragments if suffix == "mp4" else {}
            parts = [folder / f"part-{part}-{name}.{suffix}" for part in range(2)]
            made = [
                write(part, codec, options, first=100 * number, mux=mux) for number, part in enumerate(parts)
            ]
            if all(made):
                path = folder / f"joined-{name}.{suffix}"
                path.write_bytes(b"".join(part.read_bytes() for part in parts))
                yield Animal(path, "joined")


def _without_sync_table(folder: Path) -> Iterator[Animal]:
    """mp4 files in which every sample counts as a keyframe."""
    for name, (codec, options) in STRUCTURES.items():
        path = folder / f"nosync-{name}.mp4"
        if write(path, codec, options):
            path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
            yield Animal(path, "no table of keyframes")


# Files that are damaged: one of each container and codec that people have.
VICTIMS = (
    "h264-open.mp4", "h264-open.mkv", "h264-open.ts", "h264-closed.avi", "h264-open.flv", "h264-refresh.mp4",
    "h264-slices.mp4", "h264-open.avi", "hevc-open.mp4", "hevc-open.mkv", "mpeg4-b.avi", "mpeg4-no-b.mp4",
    "mpeg2-open.ts", "mpeg2-open.mpg", "vp8-hidden.webm", "vp9-hidden.webm", "vp9-hidden.mp4", "av1.mkv",
    "av1.mp4", "h264-one.mp4",
)  # fmt: skip


def damaged_animals(folder: Path, rng: random.Random) -> Iterator[Animal]:
    """Damages copies of `VICTIMS`, which must lie in `folder`."""
    for victim in VICTIMS:
        source = folder / victim
        if not source.exists():
            continue
        content, spans = source.read_bytes(), packet_spans(source)
        made = {"cut": content[: rng.randrange(len(content) // 3, len(content))]}
        for number in range(3):
            made[f"one packet {number}"] = _spoil(content, [rng.choice(spans)], rng)
            made[f"some packets {number}"] = _spoil(content, rng.sample(spans, len(spans) // 3), rng)
            made[f"bytes {number}"] = _flip(content, rng, rng.randint(1, 8))
            hole = rng.randrange(len(content))
            made[f"zeros {number}"] = (
                content[:hole] + bytes(len(content[hole : hole + 300])) + content[hole + 300 :]
            )
        if source.suffix == ".ts":
            packets = transport_packets(content)
            made["lost packets"] = b"".join(packet for packet in packets if rng.random() > 0.02)
        for name, spoiled in made.items():
            path = folder / f"{name.replace(' ', '-')}-{victim}"
            path.write_bytes(spoiled)
            yield Animal(path, name.rstrip(" 0123456789"), damaged=True)


def _spoil(content: bytes, spans: list[tuple[int, int]], rng: random.Random) -> bytes:
    """Fills the middle of packets with random bytes."""
    spoiled = bytearray(content)
    for begin, size in spans:
        start, end = begin + size // 4, min(begin + size, len(content))
        spoiled[start:end] = rng.randbytes(max(0, end - start))
    return bytes(spoiled)


def _flip(content: bytes, rng: random.Random, count: int) -> bytes:
    spoiled = bytearray(content)
    for _ in range(count):
        spoiled[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    animals = [*good_animals(target), *damaged_animals(target, random.Random(0))]
    print(f"{len(animals)} files")
