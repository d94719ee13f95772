"""An hour-long video: any frame equals that of a plain decode, and little of the file is read for it."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from video_files import SIZE, decode_all, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import demux, packet_index
from crosslmm_jax.data.media.video import probe, read_frames

FRAMES, GAP_MS, GOP = 18_000, 200, 50


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A file of one hour with open GOPs and B-frames, and all its frames."""
    path = write_video(
        tmp_path_factory.mktemp("hour") / "hour.mp4", FRAMES, width=32, height=32,
        options={"preset": "ultrafast", "g": str(GOP), "bf": "2", "x264-params": "open-gop=1:scenecut=0"},
        ticks=range(0, GAP_MS * FRAMES, GAP_MS),
    )  # fmt: skip
    frames, times = decode_all(path)
    assert len(frames) == FRAMES and times[-1] == pytest.approx(3600, abs=1)
    return path, frames


@pytest.fixture
def packets_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The times of all packets that are read from files."""
    read: list[int] = []
    original = demux._demux

    def noted(stream: Any) -> Iterator[Any]:
        for packet in original(stream):
            read.append(packet.pts)
            yield packet

    monkeypatch.setattr(demux, "_demux", noted)
    return read


@pytest.mark.slow
def test_frames_of_an_hour(hour: tuple[Path, np.ndarray], packets_read: list[int]) -> None:
    path, frames = hour
    for count in (1, 2, 8, 64):
        packets_read.clear()
        clip = read_frames(path, SamplingConfig(frames=count), size=SIZE)
        chosen = np.arange(count) * (FRAMES - 1) // max(1, count - 1)
        np.testing.assert_array_equal(clip.frames, frames[chosen])
        assert len(packets_read) < (count + 1) * (2 * GOP + 40)
    packets_read.clear()
    assert probe(path).num_frames == FRAMES
    assert len(packets_read) < 256 + 32 * 10 + 2 * GOP  # those that are decoded, and after each seek


@pytest.mark.slow
def test_random_parts_of_an_hour(hour: tuple[Path, np.ndarray]) -> None:
    path, frames = hour
    rng = random.Random(0)
    for _ in range(40):
        start = rng.randrange(FRAMES - 400)
        count = rng.randint(1, 5)
        length = rng.randint(count, 400)
        bounds = (start * GAP_MS / 1000 - 0.01, (start + length) * GAP_MS / 1000 - 0.01)
        clip = read_frames(path, SamplingConfig(frames=count), size=SIZE, bounds=bounds)
        chosen = start + np.arange(count) * (length - 1) // max(1, count - 1)
        np.testing.assert_array_equal(clip.frames, frames[chosen])
        np.testing.assert_allclose(clip.times, chosen * GAP_MS / 1000, atol=1e-3)


def test_an_hour_in_matroska(
    hour: tuple[Path, np.ndarray], packets_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packets are read once for their times and, as those of a large file, not kept but sought then."""
    path, frames = hour
    monkeypatch.setattr(packet_index, "KEEP_BYTES", 0)
    copy = path.with_suffix(".mkv")
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:
        original = source.streams.video[0]
        stream = target.add_stream_from_template(original)
        for packet in source.demux(original):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    packets_read.clear()
    clip = read_frames(copy, SamplingConfig(frames=6), size=SIZE)
    np.testing.assert_array_equal(clip.frames, frames[np.arange(6) * (FRAMES - 1) // 5])
    assert len(packets_read) < FRAMES + 6 * (2 * GOP + 40)
