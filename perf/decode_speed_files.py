"""Videos for `decode_speed`: short ones that are encoded, and hour-long ones made of their packets."""

import random
from pathlib import Path
from typing import Any

import numpy as np

RATE, WIDTH, HEIGHT = 25, 640, 360
GOPS = (12, 48, 250)  # frames from one keyframe to the next
SHORT_FRAMES = {12: 1200, 48: 1200, 250: 1250}
LONG_FRAMES = 3600 * RATE
SCENE_FRAMES = 7 * RATE
_KINDS = (("libx264", "mp4"), ("libx264", "mkv"), ("mpeg4", "avi"), ("mpeg4", "mp4"))


def write_files(folder: Path) -> dict[tuple[str, int], Path]:
    """Writes a short and a long file for each GOP size, unless they exist."""
    files = {}
    for gop in GOPS:
        short, long = folder / f"short-{gop}.mp4", folder / f"long-{gop}.mp4"
        if not long.exists():
            write_video(short, gop=gop, frames=SHORT_FRAMES[gop])
            repeat_video(short, long, times=LONG_FRAMES // SHORT_FRAMES[gop])
        files["short", gop], files["long", gop] = short, long
    return files


def write_mixed(folder: Path, *, seed: int = 0) -> list[Path]:
    """Writes 24 small videos of several codecs and sizes, and 12 copies, truncated or with bytes changed."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    paths = []
    for number in range(24):
        codec, suffix = rng.choice(_KINDS)
        path = folder / f"{number}.{suffix}"
        size = (16 * rng.randint(8, 40), 16 * rng.randint(6, 24))
        write_video(
            path, gop=rng.choice(GOPS), frames=rng.randint(1, 24), codec=codec, size=size, seed=number
        )
        paths.append(path)
    for number, path in enumerate(rng.sample(paths, 12)):
        content = bytearray(path.read_bytes())
        if number % 2:
            content = content[: rng.randrange(len(content))]
        else:
            for _ in range(10):
                content[rng.randrange(len(content))] ^= rng.randint(1, 255)
        paths.append(path.with_stem(f"damaged-{path.stem}"))
        paths[-1].write_bytes(content)
    return paths


def write_video(
    path: Path,
    *,
    gop: int,
    frames: int,
    codec: str = "libx264",
    size: tuple[int, int] = (WIDTH, HEIGHT),
    seed: int = 0,
) -> None:
    """Writes a panning texture, noise, four moving patches and cuts; encoder defaults but for keyframes."""
    import av

    rng = np.random.default_rng(seed)
    width, height = size
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
        scene: list[Any] = []
        for number in range(frames):
            step = number % SCENE_FRAMES
            if step == 0:
                scene = [_texture(rng, 2 * height, 2 * width), rng.uniform(-2, 2, 2)]
                scene += [
                    (_texture(rng, 80, 80), rng.uniform(0, 99, 2), rng.uniform(-4, 4, 2)) for _ in range(4)
                ]
            background, pan = scene[:2]
            top, left = (np.array([height, width]) / 2 + step * pan).astype(int) % (height, width)
            noise = rng.normal(0, 2, (height, width, 1))
            pixels = background[top : top + height, left : left + width] + noise
            for patch, start, speed in scene[2:]:
                y, x = (start + step * speed).astype(int) % (height - 80, width - 80)
                pixels[y : y + 80, x : x + 80] = patch
            frame = av.VideoFrame.from_ndarray(pixels.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float64[height, width, 3] of blocks of three sizes."""
    total = np.full((height, width, 3), 120.0)
    for side, contrast in ((64, 30), (16, 15), (4, 8)):
        blocks = rng.normal(0, contrast, (height // side + 1, width // side + 1, 3))
        total += np.kron(blocks, np.ones((side, side, 1)))[:height, :width]
    return total


def repeat_video(source: Path, target: Path, *, times: int) -> None:
    """Writes the packets of `source` to `target` `times` times, one after the other, without encoding."""
    import av

    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        original = reader.streams.video[0]
        stream = writer.add_stream_from_template(original)
        packets = [packet for packet in reader.demux(original) if packet.size]
        length = sum(packet.duration or 0 for packet in packets)
        for turn in range(times):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = (packet.pts or 0) + turn * length, (packet.dts or 0) + turn * length
                copy.duration, copy.time_base = packet.duration, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                writer.mux(copy)
