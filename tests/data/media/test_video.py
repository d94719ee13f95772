"""Frames against a plain decode of every frame, for many kinds of files, and errors of damaged ones."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from video_files import SIZE, Collected, decode_all, write_sound, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import locate as media
from crosslmm_jax.data.media import packet_index
from crosslmm_jax.data.media.decoding import decode, frame_store
from crosslmm_jax.data.media.to_square import ToSquare
from crosslmm_jax.data.media.video import probe, read_frames
from crosslmm_jax.errors import DataError, UserError

KINDS: dict[str, dict[str, Any]] = {
    "one_group.mp4": {},
    "short_gops.mp4": {"options": {"g": "6"}},
    "open_gops.mp4": {"options": {"g": "6", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}},
    "no_b_frames.mp4": {"options": {"bf": "0", "g": "5"}},
    "matroska.mkv": {"options": {"g": "7"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "5"}},
    "transport.ts": {"options": {"g": "8"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "9", "deadline": "realtime", "cpu-used": "8"}},
    "odd_size.mp4": {"width": 50, "height": 98},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("keep", [True, False], ids=["small", "large"])
def test_frames_equal_a_plain_decode(
    tmp_path: Path, name: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not keep:  # as if the file were too large to keep its packets
        monkeypatch.setattr(packet_index, "KEEP_BYTES", 0)
    path = write_video(tmp_path / name, 40, **KINDS[name])
    frames, times = decode_all(path)
    assert len(frames) == 40
    for wanted in (1, 2, 3, 7, 40, 50):
        indices = [39 * k // max(wanted - 1, 1) for k in range(wanted)]
        clip = read_frames(path, SamplingConfig(frames=wanted), size=SIZE)
        assert clip.frames.shape == (wanted, SIZE, SIZE, 3) and clip.frames.dtype == np.uint8
        np.testing.assert_array_equal(clip.frames, frames[indices])
        np.testing.assert_allclose(clip.times, times[indices], atol=2e-3)
        assert clip.duration == pytest.approx(1.6, abs=5e-3)


def test_variable_frame_rate_is_sampled_in_time(tmp_path: Path) -> None:
    # 20 frames in the first second, then one frame per second
    ticks = [50 * k for k in range(20)] + [1000 * k for k in range(1, 10)]
    path = write_video(tmp_path / "variable.mkv", len(ticks), ticks=ticks)
    frames, times = decode_all(path)
    clip = read_frames(path, SamplingConfig(frames=4), size=SIZE)
    np.testing.assert_allclose(clip.times, [0, 3, 6, 9], atol=2e-3)
    np.testing.assert_array_equal(clip.frames, frames[[0, 22, 25, 28]])
    every_second = read_frames(path, SamplingConfig(policy="fps", fps=0.5, frames=16), size=SIZE)
    np.testing.assert_allclose(every_second.times[:5], [0, 2, 4, 6, 8], atol=2e-3)
    np.testing.assert_allclose(times[[0, 22]], [0, 3], atol=2e-3)


def test_bounds(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 50)
    frames, _ = decode_all(path)
    clip = read_frames(path, SamplingConfig(frames=3), size=SIZE, bounds=(0.4, 1.2))
    np.testing.assert_allclose(clip.times, [0.4, 0.76, 1.16], atol=1e-3)
    np.testing.assert_array_equal(clip.frames, frames[[10, 19, 29]])
    assert clip.duration == pytest.approx(0.8, abs=1e-3)
    to_end = read_frames(path, SamplingConfig(frames=2), size=SIZE, bounds=(1.0, float("inf")))
    np.testing.assert_array_equal(to_end.frames, frames[[25, 49]])
    for sampling in (SamplingConfig(frames=2), SamplingConfig(policy="fps", fps=50.0, frames=9)):
        between = read_frames(path, sampling, size=SIZE, bounds=(0.41, 0.435))
        assert between.duration == pytest.approx(0.025) and len(between.frames) == 2
        np.testing.assert_array_equal(between.frames, frames[[10, 10]])
    last = read_frames(path, SamplingConfig(frames=1), size=SIZE, bounds=(1.99, 3))
    np.testing.assert_array_equal(last.frames, frames[[49]])
    with pytest.raises(DataError, match="a.mp4: no frames between 5 and 6 seconds") as caught:
        read_frames(path, SamplingConfig(frames=3), size=SIZE, bounds=(5, 6))
    assert caught.value.fault.reason == "clip_times"


def test_decoder_threads_do_not_change_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "10"})
    one, many = (
        read_frames(path, SamplingConfig(frames=9), size=SIZE, num_threads=threads) for threads in (1, 0)
    )
    np.testing.assert_array_equal(one.frames, many.frames)


def test_rotation_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write the rotation")
        stream.set_display_rotation(90)
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:16, 32:] = 200
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    frame = read_frames(path, SamplingConfig(frames=1), size=SIZE).frames[0].astype(int)
    half = SIZE // 2
    # The bright quarter moves from the top right to the top left.
    assert frame[2 : half - 2, 2 : half - 2].min() > 150 and frame[half + 2 :].max() < 50
    assert frame[:, half + 2 :].max() < 50


def test_probe(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "a.mp4", 30))
    assert (info.num_frames, info.width, info.height) == (30, 64, 48)
    assert info.fps == pytest.approx(25) and info.duration == pytest.approx(1.2)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_still_image_is_one_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(path)
    clip = read_frames(path, SamplingConfig(frames=8), size=SIZE)
    expected = np.asarray(Image.open(path).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(clip.frames, expected[None])
    assert clip.times.tolist() == [0] and clip.duration == 0


def write_bad_files(folder: Path) -> dict[str, str]:
    """Damaged files in `folder`, and a word of the message that each must give."""
    good = write_video(folder / "good.mp4", 60, options={"g": "10"}).read_bytes()
    with av.open(str(folder / "good.mp4")) as source:
        with av.open(str(folder / "front.mp4"), "w", options={"movflags": "faststart"}) as copy:
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    copy.mux(packet)
    front = (folder / "front.mp4").read_bytes()
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    (folder / "cut_front.mp4").write_bytes(front[: len(front) * 3 // 4])
    (folder / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 99)
    write_sound(folder / "sound.mp4")
    (folder / "folder.mp4").mkdir()
    return {
        "missing.mp4": "no such file",
        "missing.png": "no such file",
        "text.mp4": "cannot be decoded",
        "empty.mp4": "cannot be decoded",
        "cut.mp4": "cannot be decoded",
        "cut_front.mp4": "is truncated or damaged",
        "noise.png": "cannot be read as an image",
        "sound.mp4": "holds no video stream",
        "folder.mp4": "is a folder",
    }


def test_damaged_files_give_one_line_that_names_them(tmp_path: Path) -> None:
    for name, words in write_bad_files(tmp_path).items():
        with pytest.raises(UserError, match=words) as caught:
            read_frames(tmp_path / name, SamplingConfig(frames=4), size=SIZE)
        message = str(caught.value)
        assert message.startswith(str(tmp_path / name)) and "\n" not in message
    assert read_frames(tmp_path / "front.mp4", SamplingConfig(frames=4), size=SIZE).frames.any()


def test_absurd_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(media, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="a.mp4: frames of 64 x 48 are too large"):
        read_frames(path, SamplingConfig(frames=1), size=SIZE)


def test_only_gops_with_wanted_frames_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 40, options={"g": "5", "sc_threshold": "0"})
    decoded = []
    original = decode.decode_packet

    def counted(*arguments: Any) -> Iterator[Any]:
        for number, frame in original(*arguments):
            decoded.append(number)
            yield number, frame

    monkeypatch.setattr(decode, "decode_packet", counted)
    read_frames(path, SamplingConfig(frames=2), size=SIZE)
    assert len(decoded) <= 6  # the first frame and the last group


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("keep", [True, False], ids=["small", "large"])
def test_sound_between_the_frames(
    tmp_path: Path, suffix: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not keep:
        monkeypatch.setattr(packet_index, "KEEP_BYTES", 0)
    silent = write_video(tmp_path / "silent.mp4", 60, options={"g": "6"})
    path = tmp_path / f"sound{suffix}"
    with av.open(str(silent)) as source, av.open(str(path), "w") as target:
        sound: Any = target.add_stream("aac", rate=16000)
        stream = target.add_stream_from_template(source.streams.video[0])
        waves = np.random.default_rng(0).normal(0, 0.1, (1, 60 * 640)).astype(np.float32)
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            part = np.ascontiguousarray(waves[:, 640 * number : 640 * (number + 1)])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 640 * number
            target.mux(sound.encode(frame))
            packet.stream = stream
            target.mux(packet)
        target.mux(sound.encode(None))
    frames, _ = decode_all(path)
    for count in (2, 5, 60):
        clip = read_frames(path, SamplingConfig(frames=count), size=SIZE)
        np.testing.assert_array_equal(clip.frames, frames[np.arange(count) * 59 // (count - 1)])


def test_video_stream_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "none.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(UserError, match="none.mkv: "):
        read_frames(path, SamplingConfig(frames=4), size=SIZE)


def test_real_clips() -> None:
    folder = Path(__file__).resolve().parents[4] / "shared" / "videos"
    clips = sorted(folder.glob("*.mp4"))
    if not clips:
        pytest.skip("the real clips are not here")
    for path in clips[-2:]:
        frames, times = decode_all(path)
        clip = read_frames(path, SamplingConfig(frames=5), size=SIZE)
        indices = [(len(frames) - 1) * k // 4 for k in range(5)]
        np.testing.assert_array_equal(clip.frames, frames[indices])
        np.testing.assert_allclose(clip.times, times[indices], atol=1e-3)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9"])
@pytest.mark.parametrize("shape", [(64, 48), (50, 98), (322, 242)])
def test_the_kept_converter_gives_the_same_pixels(tmp_path: Path, codec: str, shape: tuple[int, int]) -> None:
    path = write_video(tmp_path / "a.mkv", 5, codec=codec, width=shape[0], height=shape[1])
    to_square = ToSquare(SIZE, "bicubic", path, 1)
    expected, _ = decode_all(path)
    with av.open(str(path)) as container:
        squares = [to_square(frame) for frame in container.decode(video=0)]
    np.testing.assert_array_equal(np.stack(squares), expected)


def test_probe_tells_what_the_file_is_like(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 60, options={"g": "12", "sc_threshold": "0"}, rotation=90)
    info = probe(path)
    assert (info.size_bytes, info.codec, info.rotation) == (path.stat().st_size, "h264", 90)
    assert info.keyframe_spacing == pytest.approx(12 / 25)
    assert probe(write_video(tmp_path / "b.webm", 5, codec="libvpx-vp9")).codec == "vp9"
    assert probe(write_video(tmp_path / "c.mkv", 1)).duration == pytest.approx(1 / 25, abs=2e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_consumer_gets_the_frames_in_order(tmp_path: Path, threads: int, monkeypatch) -> None:
    """Of a clip that repeats frames too, of pictures in a folder, and of a single picture."""
    monkeypatch.setattr(frame_store, "MOST_WAITING", 6)
    path, folder = write_video(tmp_path / "a.mp4", 30), tmp_path / "pictures"
    folder.mkdir()
    for number, frame in enumerate(read_frames(path, SamplingConfig(frames=9), size=SIZE).frames):
        Image.fromarray(frame).save(folder / f"{number}.png")
    for source, frames, count in (
        (path, 12, 12), (path, 60, 60), (folder, 9, 9), (folder, 20, 20), (folder / "0.png", 4, 1),
    ):  # fmt: skip
        read = functools.partial(
            read_frames, source, SamplingConfig(frames=frames), size=SIZE, num_threads=threads
        )
        expected = read()
        assert len(expected.frames) == count
        for keep in (False, True):
            clip = read(consumer=(consumer := Collected(5)), keep=keep)
            np.testing.assert_array_equal(consumer.frames, expected.frames)
            np.testing.assert_array_equal(clip.frames, expected.frames if keep else expected.frames[:0])
            np.testing.assert_array_equal(clip.times, expected.times)
            assert clip.duration == expected.duration and consumer.begun == 1
