"""Videos that are still being written: their frames against those of the finished file."""

import io
import itertools
import os
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from video_files import SIZE, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import follow, live, read_frames
from crosslmm_jax.errors import DataError

COUNT, FPS = 60, 25


def all_frames(path: Path) -> np.ndarray:
    return read_frames(path, SamplingConfig(frames=COUNT), size=SIZE).frames


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
def test_a_growing_file_gives_each_frame_soon(tmp_path, suffix):
    options = {"g": "10", "bf": "2", "qp": "0"}
    whole = write_video(tmp_path / f"whole.{suffix}", COUNT, width=320, height=240, options=options)
    content, growing = whole.read_bytes(), tmp_path / f"growing.{suffix}"
    begun, came, lengths = len(content) // 4, [], []
    growing.write_bytes(content[:begun])

    def write_the_rest() -> None:
        with open(growing, "ab") as file:
            for begin in range(begun, len(content), 500):
                file.write(content[begin : begin + 500])
                file.flush()
                time.sleep(0.01)

    writer = threading.Thread(target=write_the_rest)
    writer.start()
    for part in follow(growing, size=SIZE, fps=5, idle_s=1.0):
        came.append(part)
        lengths.append(growing.stat().st_size)
    writer.join()
    assert lengths[0] < len(content)  # the first frames came before the last was written
    times = np.concatenate([part.times for part in came])
    np.testing.assert_allclose(times, np.arange(0, COUNT / FPS, 0.2), atol=2e-3)
    np.testing.assert_array_equal(np.concatenate([part.frames for part in came]), all_frames(whole)[::5])


def test_a_pipe_and_a_rate_above_that_of_the_video(tmp_path):
    """Every frame is given once; a frame on display for several multiples too."""
    path = write_video(tmp_path / "a.ts", COUNT)
    with open(path, "rb") as pipe:
        parts = list(follow(pipe, size=SIZE, fps=100))
    np.testing.assert_array_equal(np.concatenate([part.frames for part in parts]), all_frames(path))
    slow = write_video(tmp_path / "b.mkv", 4, ticks=[0, 900, 1050, 2500])
    with open(slow, "rb") as pipe:
        times = np.concatenate([part.times for part in follow(pipe, size=SIZE, fps=1)])
    np.testing.assert_allclose(times, [0, 0.9, 1.05], atol=1e-3)  # on display at 0, 1 and 2 seconds


def test_a_buffered_pipe_gives_what_has_come(tmp_path):
    """Not only once its buffer is full, nor once the writer is done."""
    content = write_video(tmp_path / "a.ts", COUNT).read_bytes()
    reading, writing = os.pipe()
    came, told = threading.Event(), []

    def write() -> None:
        with open(writing, "wb", buffering=0) as pipe:
            pipe.write(content[: len(content) * 3 // 4])
            told.append(came.wait(10))
            pipe.write(content[len(content) * 3 // 4 :])

    writer = threading.Thread(target=write)
    writer.start()
    with open(reading, "rb") as pipe:
        for _ in follow(pipe, size=SIZE, fps=25):
            came.set()
    writer.join()
    assert len(content) < io.DEFAULT_BUFFER_SIZE * 4 and told == [True]


def test_the_end_of_a_file_is_waited_for_once(tmp_path, monkeypatch):
    clock = itertools.count(0.0, 1.0)
    stopped = types.SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None)
    monkeypatch.setattr(live, "time", stopped)
    path = write_video(tmp_path / "a.ts", 20)
    assert sum(len(part.times) for part in follow(path, size=SIZE, fps=25, idle_s=100)) == 20
    assert next(clock) < 150


class Breaks:
    """A pipe that ends with an error."""

    def __init__(self, content: bytes) -> None:
        self.parts = iter([content[:4000], None, content[4000:]])  # None: nothing yet

    def read(self, size: int = -1, /) -> bytes:
        for part in self.parts:
            return part  # type: ignore[return-value]
        raise ConnectionResetError(104, "Connection reset by peer")


def test_times_that_start_again_go_on(tmp_path):
    one = write_video(tmp_path / "a.ts", 20).read_bytes()
    (tmp_path / "b.ts").write_bytes(one + one)
    times = np.concatenate([part.times for part in follow(tmp_path / "b.ts", size=SIZE, fps=25, idle_s=0.1)])
    np.testing.assert_allclose(times, np.arange(40) / FPS, atol=2e-3)


def test_what_cannot_be_followed_is_said(tmp_path):
    with pytest.raises(DataError, match="correct the path"):
        next(follow(tmp_path / "none.mkv", size=SIZE))
    with pytest.raises(DataError, match="fps is 0"):
        next(follow(tmp_path / "none.mkv", size=SIZE, fps=0))
    path = write_video(tmp_path / "a.mp4", 20)
    (tmp_path / "half.mp4").write_bytes(path.read_bytes().partition(b"moov")[0][:-4])  # its tables come last
    fix = "write MPEG-TS, Matroska or fragmented mp4"
    with pytest.raises(DataError, match=rf"half\.mp4: cannot be read from front to back .*{fix}"):
        next(follow(tmp_path / "half.mp4", size=SIZE, idle_s=0.1))
    fragments = write_video(tmp_path / "b.mp4", 20, mux={"movflags": "frag_keyframe+empty_moov"})
    assert list(follow(fragments, size=SIZE, idle_s=0.1))
    for content in (b"", b"no video" * 999):
        with pytest.raises(DataError, match=f"pipe: cannot be read from front to back .*{fix}"):
            next(follow(io.BytesIO(content), size=SIZE))
    stream = write_video(tmp_path / "a.ts", COUNT).read_bytes()
    with pytest.raises(DataError, match="pipe: breaks off .Connection reset by peer.; start what writes it"):
        list(follow(Breaks(stream[:8000]), size=SIZE))
    damaged = bytearray(stream)
    for begin in range(188 * 4, len(damaged), 188):
        damaged[begin + 60 : begin + 188] = bytes(128)
    with pytest.raises(DataError, match="holds no frame that can be decoded; begin at a keyframe"):
        list(follow(io.BytesIO(damaged), size=SIZE))
