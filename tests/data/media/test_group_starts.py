"""Decoding starts only where the decoder gives a complete picture, whatever the file calls a keyframe."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_decode import plain_decode
from zoo import FRAMES, SIDE, STRUCTURES, write

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import packet_index
from crosslmm_jax.data.media.decoding import decode
from crosslmm_jax.data.media.video import read_frames


def check_every_frame(path: Path) -> None:
    """Each frame alone, and pairs far apart, against a plain decode."""
    plain = plain_decode(path, SIDE)
    assert len(plain.images) == FRAMES
    for number, time in enumerate(plain.times):
        bounds = (max(0.0, time - 1e-3), time + 1e-3)
        clip = read_frames(path, SamplingConfig(frames=1), size=SIDE, bounds=bounds)
        np.testing.assert_array_equal(clip.frames[0], plain.images[number], f"frame {number}")
    clip = read_frames(path, SamplingConfig(frames=3), size=SIDE)
    np.testing.assert_array_equal(clip.frames, plain.images[[0, (FRAMES - 1) // 2, FRAMES - 1]])


@pytest.mark.parametrize("keep", [2**26, 0], ids=["small", "large"])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_gradual_refresh(tmp_path: Path, suffix: str, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file flags the points at which a refresh begins as keyframes."""
    monkeypatch.setattr(packet_index, "KEEP_BYTES", keep)
    path = tmp_path / f"a.{suffix}"
    assert write(path, *STRUCTURES["h264-refresh"])
    check_every_frame(path)


@pytest.mark.parametrize("keep", [2**26, 0], ids=["small", "large"])
@pytest.mark.parametrize("name", ["mpeg4-no-b", "mpeg4-b", "h264-open", "hevc-open", "mpeg2-open"])
def test_every_sample_flagged_as_keyframe(
    tmp_path: Path, name: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packet_index, "KEEP_BYTES", keep)
    path = tmp_path / "a.mp4"
    assert write(path, *STRUCTURES[name])
    content = path.read_bytes()
    assert b"stss" in content
    path.write_bytes(content.replace(b"stss", b"free"))
    check_every_frame(path)


def test_going_back_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every sample is flagged, starts are tried at growing distances, and false ones are remembered."""
    path = tmp_path / "a.mp4"
    assert write(path, "mpeg4", {"g": "20"})
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    sent = []
    original = decode.decode_packet

    def noted(*arguments: Any) -> Iterator[Any]:
        sent.append(arguments[2])
        yield from original(*arguments)

    monkeypatch.setattr(decode, "decode_packet", noted)
    read_frames(path, SamplingConfig(frames=1), size=SIDE, bounds=(39 / 25, 2.0))
    assert len(sent) < 4 * 20
