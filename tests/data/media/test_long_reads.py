"""Long files: GOPs side by side in threads, and keyframes nearest to the wanted times."""

from pathlib import Path

import av
import numpy as np
import pytest
from video_files import SIZE, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import read_frames, video
from crosslmm_jax.data.media.decoding import wanted_frames
from crosslmm_jax.errors import DataError

COUNT, FPS = 120, 25
ALL = SamplingConfig(frames=COUNT)


@pytest.fixture(scope="module", params=["closed", "open", "hevc"])
def path(request, tmp_path_factory):
    codec = "libx265" if request.param == "hevc" else "libx264"
    options = {"g": "10", "bf": "2", "x264-params": f"open-gop={int(request.param == 'open')}"}
    if request.param == "hevc":
        options = {"x265-params": "keyint=10:min-keyint=10:bframes=2:log-level=none"}
    return write_video(tmp_path_factory.mktemp("long") / "a.mp4", COUNT, codec=codec, options=options)


def keyframes_of(path: Path) -> np.ndarray:
    """Numbers of the frames whose packets are flagged, in order of display."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
    times = np.array([packet.pts for packet in packets])
    return np.flatnonzero(np.array([packet.is_keyframe for packet in packets])[np.argsort(times)])


@pytest.fixture
def in_threads(monkeypatch):
    """Counts the files that are opened for decoding in threads."""
    opened = []
    monkeypatch.setattr(wanted_frames, "THREADS_FROM", 1)
    open_decoder = video._open_decoder
    monkeypatch.setattr(video, "_open_decoder", lambda *words: (opened.append(1), open_decoder(*words))[1])
    return opened


@pytest.mark.parametrize("sampling", [ALL, SamplingConfig(frames=17)], ids=["all", "some"])
def test_threads_give_the_same_frames_and_tell_of_them_in_order(path, sampling, in_threads):
    expected = read_frames(path, sampling, size=SIZE, num_threads=1)
    assert not in_threads
    told = []

    def tell(images: np.ndarray, count: int) -> None:
        np.testing.assert_array_equal(images[:count], expected.frames[:count])
        told.append(count)

    got = read_frames(path, sampling, size=SIZE, num_threads=4, on_frames=tell)
    assert len(in_threads) == 4
    np.testing.assert_array_equal(got.frames, expected.frames)
    np.testing.assert_array_equal(got.times, expected.times)
    assert told == sorted(set(told)) and told[-1] == len(expected.frames)


def test_damage_in_one_thread_is_as_without_threads(path, tmp_path, in_threads):
    """The other threads end, and what is read is what a plain decode shows."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)

    def read(threads: int) -> np.ndarray | str:
        try:
            return read_frames(damaged, ALL, size=SIZE, num_threads=threads).frames
        except DataError as error:
            return str(error)

    np.testing.assert_array_equal(read(4), read(1))


@pytest.mark.parametrize("threads", [1, 4])
def test_keyframes_are_the_nearest_ones(path, threads, in_threads):
    everything = read_frames(path, ALL, size=SIZE)
    numbers = keyframes_of(path)
    assert 8 < len(numbers) < 30
    clip = read_frames(path, SamplingConfig(frames=COUNT), size=SIZE, num_threads=threads, keyframes=True)
    np.testing.assert_allclose(clip.times, numbers / FPS, atol=1e-6)  # each of them once
    np.testing.assert_array_equal(clip.frames, everything.frames[numbers])
    few = read_frames(path, SamplingConfig(frames=4), size=SIZE, num_threads=threads, keyframes=True)
    wanted = read_frames(path, SamplingConfig(frames=4), size=SIZE).times
    nearest = np.abs(clip.times[:, None] - wanted).min(axis=0)
    np.testing.assert_allclose(np.abs(few.times - wanted), nearest, atol=1e-6)
    part = read_frames(path, SamplingConfig(frames=1), size=SIZE, bounds=(2.0, 3.0), keyframes=True)
    assert abs(part.times[0] - 2.0) == np.abs(clip.times - 2.0).min()
