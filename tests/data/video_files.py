"""Small videos of many kinds for tests, and a plain decoder to compare with."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from crosslmm_jax.data.media.image import Clip

SIZE = 24


def write_video(
    path: Path,
    count: int,
    *,
    codec: str = "libx264",
    width: int = 64,
    height: int = 48,
    options: dict[str, str] | None = None,
    ticks: Sequence[int] | None = None,
    rotation: int = 0,
    mux: dict[str, str] | None = None,
) -> Path:
    """A video in which brightness and a moving bar tell every frame apart; `ticks` are milliseconds.

    `options` are the encoder's, `mux` those of the file format.
    """
    with av.open(str(path), "w", container_options=mux or {}) as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = options or {}
        if rotation:
            stream.set_display_rotation(rotation)
        if ticks is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            pixels = np.full((height, width, 3), 30 + 5 * number % 200, np.uint8)
            pixels[:, number % width] = (255, 0, number % 256)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_streams(
    path: Path,
    widths: Sequence[int],
    *,
    default: int | None = None,
    cover: int | None = None,
    count: int = 6,
    mux: dict[str, str] | None = None,
) -> Path:
    """A file with a video stream of each width, in that order, one frame of each in turn.

    Stream `default` is marked as that. Stream `cover` is marked as a picture and has one frame.
    """
    with av.open(str(path), "w", container_options=mux or {}) as container:
        streams: list[Any] = []
        for number, width in enumerate(widths):
            stream: Any = container.add_stream("mjpeg" if number == cover else "libx264", rate=25)
            stream.width, stream.height = width, width * 3 // 4
            stream.pix_fmt = "yuvj420p" if number == cover else "yuv420p"
            stream.disposition = Disposition(0)
            if number == cover:
                stream.disposition = Disposition.attached_pic
            elif number == default:
                stream.disposition = Disposition.default
            streams.append(stream)
        for number in range(count):
            for place, stream in enumerate(streams):
                if place == cover and number:
                    continue
                pixels = np.full((stream.height, stream.width, 3), 40 + 20 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def set_matrix(path: Path, matrix: Sequence[int]) -> None:
    """Overwrites the display matrix of the first track of an mp4: nine numbers as in ISO/IEC 14496-12."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every frame, decoded plainly and resized, and its time in seconds."""
    frames, times = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            pixels = frame.reformat(format="rgb24", threads=1).to_ndarray()  # starting threads takes longer
            image = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)))
            frames.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
            times.append(frame.time)
    return np.stack(frames), np.array(times) - times[0]


def write_sound(path: Path) -> None:
    """Writes a file with sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def assert_same(found: Clip, wanted: Clip) -> None:
    """Frames, times and duration."""
    np.testing.assert_array_equal(found.frames, wanted.frames)
    np.testing.assert_array_equal(found.times, wanted.times)
    assert found.duration == wanted.duration


def packet_spans(path: Path) -> list[tuple[int, int]]:
    """First byte and length of each video packet, where the container stores it in one piece."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size and (packet.pos or -1) >= 0]
    return [(packet.pos or 0, packet.size) for packet in packets]


def transport_packets(content: bytes) -> list[bytes]:
    """The packets of an MPEG transport stream, of which each video packet takes several."""
    return [content[at : at + 188] for at in range(0, len(content), 188)]


def spoil_packets(path: Path, numbers: list[int]) -> None:
    """Makes the decoder refuse packets of H.264 in mp4: their NAL units claim to be longer than they are."""
    content, spans = bytearray(path.read_bytes()), packet_spans(path)
    for number in numbers:
        content[spans[number][0]] = 0x7F
    path.write_bytes(content)


class Collected:
    """A consumer that keeps copies of what it is given, `step` frames at a time."""

    def __init__(self, step: int) -> None:
        self.step, self.begun = step, 0
        self.sizes: list[int] = []
        self.given: list[np.ndarray] = []

    def begin(self, count: int) -> int:
        self.begun, self.sizes, self.given = self.begun + 1, [], []
        return self.step

    def add(self, frames: np.ndarray) -> None:
        self.sizes.append(len(frames))
        self.given.append(frames.copy())

    @property
    def frames(self) -> np.ndarray:
        return np.concatenate(self.given)
