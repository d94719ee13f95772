"""The benchmark of the video reader: its files, and what it says where a reader is missing."""

import sys
from pathlib import Path

import pytest
from video_files import decode_all

from crosslmm_jax.data.media.video import probe
from crosslmm_jax.errors import UserError
from perf.decode_speed import decode_alone, memory_growth, readers
from perf.decode_speed_files import repeat_video, write_video


def test_a_repeated_video_holds_its_frames_again(tmp_path: Path) -> None:
    short, long = tmp_path / "short.mp4", tmp_path / "long.mp4"
    write_video(short, gop=12, frames=36, size=(128, 96))
    repeat_video(short, long, times=5)
    once, _ = decode_all(short)
    frames, times = decode_all(long)
    assert (frames.reshape(5, *once.shape) == once).all()
    assert (times[1:] - times[:-1]) == pytest.approx(1 / 25)
    info = probe(long)
    assert (info.num_frames, info.keyframe_spacing) == (180, pytest.approx(12 / 25))
    assert decode_alone(long, 3) > 0


def test_a_missing_reader_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"cv2 is not installed: pip install -e '\.\[benchmark\]'"):
        readers()


def test_memory_counts_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(bytes(100))
    found = memory_growth([tmp_path / "bad.mp4"], reads=10)
    assert (found["files"], found["reads"], found["failures"]) == (1, 10, 10)
    assert found["mib_in_rest"] > 10
