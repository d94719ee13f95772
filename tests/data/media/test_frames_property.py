"""Random choices of frames equal a plain decode of every frame; the files are drawn too."""

import random
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import SIZE, decode_all, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import packet_index
from crosslmm_jax.data.media.video import probe, read_frames

X265 = {"x265-params": "log-level=none:pools=none:keyint=8:min-keyint=8:bframes=3:open-gop=1:scenecut=0"}
CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "h264.mp4": ("libx264", {"g": "9", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "h264.mkv": ("libx264", {"g": "5", "bf": "2", "x264-params": "b-pyramid=2:scenecut=0"}),
    "mpeg4.mp4": ("mpeg4", {"g": "7", "bf": "2"}),
    "vp9.webm": ("libvpx-vp9", {"g": "9", "cpu-used": "8", "lag-in-frames": "10", "auto-alt-ref": "1"}),
    "vp9.mp4": ("libvpx-vp9", {"g": "11", "cpu-used": "8", "lag-in-frames": "10", "auto-alt-ref": "1"}),
    "hevc.mkv": ("libx265", X265 | {"preset": "ultrafast"}),
    "hevc.mp4": ("libx265", X265 | {"preset": "ultrafast"}),
    "hevc_layers.mp4": ("libx265", {"x265-params": X265["x265-params"] + ":temporal-layers=3:b-adapt=0"}),
    "av1.mkv": ("libsvtav1", {"preset": "12", "g": "9", "svtav1-params": "lp=1"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "g": "9", "svtav1-params": "lp=1"}),
}


def draw_video(path: Path, rng: random.Random, codec: str, options: dict[str, str]) -> Path:
    """A file with length, size, rate and rotation drawn."""
    count = rng.choice([1, 2, 31, 48, 48])
    if codec == "libx265" and count < 3:  # it gives clips shorter than its delay no time of decoding
        options = {"x265-params": options["x265-params"].replace("bframes=3", "bframes=0")}
    ticks = None
    if rng.random() < 0.5:  # variable rate: gaps of 20 ms to half a second
        ticks = np.cumsum([0, *(rng.randint(20, 500) for _ in range(count - 1))]).tolist()
    width, height = rng.choice([(64, 64), (66, 98), (130, 74)])
    rotation = rng.choice([0, 90, 180, 270]) if path.suffix == ".mp4" else 0
    return write_video(
        path, count, codec=codec, width=width, height=height, options=options, ticks=ticks, rotation=rotation
    )


def draw_sampling(rng: random.Random, count: int) -> SamplingConfig:
    frames = rng.randint(1, count + 4)
    return rng.choice(
        [
            SamplingConfig(frames=frames),
            SamplingConfig(policy="fps", fps=rng.choice([0.5, 2.0, 7.0]), frames=64),
            SamplingConfig(policy="llava", fps=1.0, frames=frames, force_sample=rng.random() < 0.5),
            SamplingConfig(policy="dynamic_fps1", min_frames=4, max_frames=16, multiple=4),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_random_frames_equal_a_plain_decode(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, options = CODECS[name]
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        pytest.skip(f"this ffmpeg has no {codec}")
    rng = random.Random(name)
    readings = []
    original = packet_index.read_index
    monkeypatch.setattr(packet_index, "read_index", lambda *of: [readings.append(of), original(*of)][1])
    for number in range(12):
        path = draw_video(tmp_path / f"{number}-{name}", rng, codec, options)
        frames, times = decode_all(path)
        assert probe(path).num_frames == len(frames)
        for _ in range(10):
            monkeypatch.setattr(packet_index, "KEEP_BYTES", rng.choice([0, 2**26]))
            bounds = None
            if rng.random() < 0.4:
                middle = times[rng.randrange(len(times))]
                bounds = (max(0.0, middle - rng.uniform(0, 1)), middle + rng.uniform(0.01, 1))
            readings.clear()
            clip = read_frames(path, draw_sampling(rng, len(frames)), size=SIZE, bounds=bounds)
            # The first way of reading finds all, and in an mp4 reads no packets for the times.
            assert len(readings) == (path.suffix != ".mp4")
            picked = np.abs(times[None] - clip.times[:, None].astype(float)).argmin(1)
            np.testing.assert_allclose(times[picked], clip.times, atol=1e-4)
            np.testing.assert_array_equal(clip.frames, frames[picked])
            if bounds is not None:
                assert (clip.times >= bounds[0] - 1e-4).all() and (clip.times < bounds[1] + 1e-4).all()


def test_any_single_frame_by_its_time(tmp_path: Path) -> None:
    """Every frame of an open-GOP file alone: each group is cut after a different packet."""
    codec, options = CODECS["h264.mp4"]
    path = write_video(tmp_path / "a.mp4", 40, codec=codec, options=options)
    frames, times = decode_all(path)
    for number, time in enumerate(times):
        clip = read_frames(path, SamplingConfig(frames=1), size=SIZE, bounds=(time - 1e-3, time + 1e-3))
        np.testing.assert_array_equal(clip.frames[0], frames[number])
