"""Long files: GOPs side by side in threads, and keyframes nearest to the wanted times."""

import signal
import threading
import time
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import SIZE, Collected, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import read_frames, to_square, video
from crosslmm_jax.data.media.decoding import decode, frame_store, wanted_frames
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
def test_threads_give_the_same_frames_in_order_and_once(path, sampling, in_threads, monkeypatch):
    """Also where all threads together are further ahead than may wait: each packet is decoded once."""
    expected = read_frames(path, sampling, size=SIZE, num_threads=1)
    assert not in_threads
    consumer, sent = Collected(3), []
    monkeypatch.setattr(frame_store, "MOST_WAITING", 4)
    decode_packet = decode.decode_packet

    def noted(context, packet, number):
        sent.extend([number] * (packet is not None))
        return decode_packet(context, packet, number)

    monkeypatch.setattr(decode, "decode_packet", noted)
    got = read_frames(path, sampling, size=SIZE, num_threads=4, consumer=consumer, keep=False)
    assert len(in_threads) == 4 and len(got.frames) == 0
    np.testing.assert_array_equal(consumer.frames, expected.frames)
    np.testing.assert_array_equal(got.times, expected.times)
    assert consumer.begun == 1 and len(sent) == len(set(sent)) <= COUNT
    kept = read_frames(path, sampling, size=SIZE, num_threads=4, consumer=(again := Collected(3)))
    for frames in (kept.frames, again.frames):
        np.testing.assert_array_equal(frames, expected.frames)
    assert again.sizes == consumer.sizes and set(again.sizes[:-1]) == {3}


def test_pixels_that_are_not_kept_do_not_exist_at_once(tmp_path, in_threads, monkeypatch):
    path, size = write_video(tmp_path / "a.mp4", COUNT, options={"g": "10"}), 128
    monkeypatch.setattr(frame_store, "MOST_WAITING", 16)

    class Nobody(Collected):
        def add(self, frames: np.ndarray) -> None:
            pass

    peaks = {}
    for keep in (False, True):
        tracemalloc.start()
        read_frames(path, ALL, size=size, num_threads=4, consumer=Nobody(4), keep=keep)
        peaks[keep] = tracemalloc.get_traced_memory()[1] / (size * size * 3)  # in frames
        tracemalloc.stop()
    assert peaks[True] > COUNT and peaks[False] < 16 + 24, peaks


def test_some_frames_are_read_again_by_their_numbers(path, in_threads):
    expected = read_frames(path, ALL, size=SIZE)
    numbers = np.array([0, 7, 8, 90, 119])
    for keyframes in (False, True):
        all_of_them = read_frames(path, ALL, size=SIZE, keyframes=keyframes) if keyframes else expected
        chosen = numbers[numbers < len(all_of_them.times)]
        again = read_frames(path, ALL, size=SIZE, num_threads=2, keyframes=keyframes, only=chosen)
        np.testing.assert_array_equal(again.frames, all_of_them.frames[chosen])
        np.testing.assert_array_equal(again.times, all_of_them.times[chosen])


def test_an_error_of_the_consumer_ends_all_threads(path, in_threads, monkeypatch):
    monkeypatch.setattr(frame_store, "MOST_WAITING", 4)

    class Failing(Collected):
        def add(self, frames: np.ndarray) -> None:
            super().add(frames)
            if len(self.sizes) == 2:
                raise OSError("the consumer fails")

    for threads in (1, 4):
        consumer = Failing(3)
        with pytest.raises(OSError, match="the consumer fails"):
            read_frames(path, ALL, size=SIZE, num_threads=threads, consumer=consumer, keep=False)
        assert consumer.sizes == [3, 3]


def test_a_frame_that_cannot_be_resized_ends_those_that_wait_for_it(tmp_path, monkeypatch):
    """Each frame is given many times, so that the ones after it are too far ahead."""
    path, calls = write_video(tmp_path / "a.mp4", 12), []
    monkeypatch.setattr(frame_store, "MOST_WAITING", 16)

    def failing(self, frame):
        calls.append(frame)
        if len(calls) == 2:
            raise DataError(self.path, "corrupt", "has a frame that is too large")
        return np.zeros((SIZE, SIZE, 3), np.uint8)

    monkeypatch.setattr(to_square.ToSquare, "__call__", failing)

    def read() -> None:
        with pytest.raises(DataError, match="a frame that is too large"):
            sampling = SamplingConfig(frames=240)
            read_frames(path, sampling, size=SIZE, num_threads=4, consumer=Collected(8), keep=False)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(20)
    assert not reading.is_alive()


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_consumer_works_on_the_last_frames():
    """It gets no more of them."""

    class Slow(Collected):
        def add(self, frames: np.ndarray) -> None:
            while not store._complete:  # then the main thread waits for this one
                time.sleep(0.01)
            super().add(frames)
            if len(self.sizes) == 2:
                time.sleep(0.1)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.1)

    consumer = Slow(4)
    store = frame_store.FrameStore(np.arange(40), SIZE, consumer, keep=False)
    with pytest.raises(KeyboardInterrupt), store:
        store.put(0, 40, np.zeros((SIZE, SIZE, 3), np.uint8))
    time.sleep(0.2)
    assert consumer.sizes == [4, 4]


def test_damage_in_one_thread_is_as_without_threads(path, tmp_path, in_threads, monkeypatch):
    """The other threads end, and what is read is what a plain decode shows."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(content)

    def read(threads: int) -> np.ndarray | str:
        try:
            return read_frames(damaged, ALL, size=SIZE, num_threads=threads, max_damaged=0.5).frames
        except DataError as error:
            return str(error)

    expected = read(1)
    np.testing.assert_array_equal(read(4), expected)
    if isinstance(expected, str):
        return
    # The consumer is told to begin anew, and gets the frames of the plain decode. Some come late there: with
    # too few that wait the file is refused, since the consumer would have others in their place.
    consumer = Collected(4)
    again = {"num_threads": 4, "max_damaged": 0.5, "consumer": consumer, "keep": False}
    monkeypatch.setattr(frame_store, "MOST_WAITING", 40)
    read_frames(damaged, ALL, size=SIZE, **again)
    np.testing.assert_array_equal(consumer.frames, expected)
    assert consumer.begun in (2, 3)
    monkeypatch.setattr(frame_store, "MOST_WAITING", 8)
    try:
        read_frames(damaged, ALL, size=SIZE, **again)
    except DataError:
        return
    np.testing.assert_array_equal(consumer.frames, expected)


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
    first = float(clip.times[5])  # a part that begins right after it, and one without any keyframe
    for bounds, there in (((first + 0.06, 4.0), clip.times[6:]), ((first + 0.06, first + 0.1), clip.times)):
        part = read_frames(path, SamplingConfig(frames=1), size=SIZE, bounds=bounds, keyframes=True)
        wanted = read_frames(path, SamplingConfig(frames=1), size=SIZE, bounds=bounds).times[0]
        assert abs(part.times[0] - wanted) == pytest.approx(np.abs(there - wanted).min(), abs=1e-6)
