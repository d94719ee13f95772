"""A plain decode: all packets in order to one decoder with one thread, a packet that raises is skipped."""

import collections
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
import av.error
import numpy as np
from av.container import InputContainer
from PIL import Image

# Formats that store times of decoding only, and codecs of pure pictures have no others.
WITHOUT_PRESENTATION = ("avi", "asf", "mxf")


class Plain(NamedTuple):
    """What a plain decode shows.

    Attributes:
        images: uint8[n, R, R, 3].
        times: float[n], seconds since the first frame; times that do not rise are laid one after another.
        errors: packets that raised.
        corrupt: frames that the decoder marks.
        numbers: int64[n], the packet of each image.
        packets: number of packets.
    """

    images: np.ndarray
    times: np.ndarray
    errors: int
    corrupt: int
    numbers: np.ndarray
    packets: int

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """Numbers of the images at some times: the last at or before each, or the first."""
        order = np.argsort(self.times, kind="stable")
        slack = 1e-4 + 1e-6 * seconds  # times of clips are float32
        places = np.searchsorted(self.times[order], seconds + slack, side="right") - 1
        return order[np.maximum(places, 0)]


def plain_decode(path: Path, size: int, *, twice: bool = False, held: int = 0, threads: int = 1) -> Plain:
    """Decodes a video. Raises av.error.FFmpegError or IndexError where PyAV finds none.

    With `twice` the decoder has decoded the file before, so it holds other pictures and states. It cannot use
    the memory of the last `held` frames for the next ones. Only a decode with a single thread is a plain one.
    """
    images, presentation, decoding, numbers, errors, corrupt = [], [], [], [], 0, 0
    kept = collections.deque[av.VideoFrame](maxlen=held)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        stream.thread_type = "AUTO" if threads > 1 else "NONE"
        context.thread_count = threads
        counted = container.format.name in WITHOUT_PRESENTATION and context.has_b_frames
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        tick, gap = float(stream.time_base or 0), 0
        packets = list(_packets(container))
        if twice:
            for packet in packets:
                if packet.size:
                    stamp, packet.pts = packet.pts, -1
                    with contextlib.suppress(av.error.FFmpegError):
                        context.decode(packet)
                    packet.pts = stamp
        for packet in packets:
            if packet.size:
                decoding.append(packet.dts)
                presentation.append(packet.pts)
                packet.pts = len(presentation) - 1  # the decoder hands it on to the frame
                gap = packet.duration or gap
            elif packet.dts is not None:
                continue
            try:
                frames = context.decode(packet if packet.size else None)
            except av.error.FFmpegError:
                errors += 1
                continue
            for frame in frames:
                if frame.pts == -1:
                    continue
                corrupt += frame.is_corrupt
                kept.append(frame)
                images.append(_square(frame, size))
                numbers.append(frame.pts)
    known = [stamp for stamp in presentation if stamp is not None]
    counted |= len(known) < len(presentation)
    rising = None not in decoding and bool(np.all(np.diff(decoding) > 0))
    counted |= rising and container.format.name != "matroska,webm" and len(set(known)) < len(known)
    counted |= container.format.name == "mpeg" and not rising
    if counted and rising:
        times = np.sort(decoding)[: len(images)] * tick
    elif counted:
        times = np.arange(len(images)) / rate
    else:
        times = _rising([presentation[number] for number in numbers], gap or round(1 / (rate * tick))) * tick
    return Plain(
        np.array(images), times - times[:1], errors, corrupt, np.array(numbers, int), len(presentation)
    )


def _packets(container: InputContainer) -> Iterator[av.Packet]:
    try:
        yield from container.demux(video=0)
    except av.error.FFmpegError:
        return


def _rising(stamps: list[int], gap: int) -> np.ndarray:
    times, shift = [], 0
    for number, stamp in enumerate(stamps):
        if number and stamp <= stamps[number - 1]:
            shift += stamps[number - 1] + gap - stamp
        times.append(stamp + shift)
    return np.array(times, float)


def _square(frame: av.VideoFrame, size: int) -> np.ndarray:
    pixels = frame.reformat(format="rgb24", threads=1).to_ndarray()  # starting threads takes longer
    image = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90 % 4)))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)
