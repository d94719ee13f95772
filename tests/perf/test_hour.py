"""`python -m perf hour`: the file that it makes."""

from pathlib import Path

import numpy as np
import pytest

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import probe, read_frames
from perf import hour
from perf.clips import RATE, write_clip


@pytest.mark.slow
def test_clips_are_repeated_packet_by_packet(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a.mp4", seconds=1, seed=0)
    hour.write_hour(tmp_path / "clips", tmp_path / "work" / "hour.mp4", seconds=2.5)
    info = probe(tmp_path / "work" / "hour.mp4")
    assert (info.width, info.height, info.codec, info.num_frames) == (1280, 720, "h264", 3 * RATE)
    assert info.duration == pytest.approx(3, abs=0.05)
    clip = read_frames(tmp_path / "work" / "hour.mp4", SamplingConfig(frames=3 * RATE), size=32)
    np.testing.assert_array_equal(clip.frames[RATE : 2 * RATE], clip.frames[:RATE])
    np.testing.assert_allclose(np.diff(clip.times), 1 / RATE, atol=1e-4)
