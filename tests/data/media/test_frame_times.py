"""Times that do not rise are laid one after another, and files without presentation times count frames."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from plain_decode import plain_decode
from zoo import FRAMES, SIDE, STRUCTURES, write

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import packet_index
from crosslmm_jax.data.media.decoding import Timestamps, lay_out, rising
from crosslmm_jax.data.media.video import probe, read_frames

FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}


def joined(folder: Path, name: str, suffix: str) -> Path:
    """Two files one after the other: the timestamps start again."""
    codec, options = STRUCTURES[name]
    parts = [folder / f"{number}.{suffix}" for number in range(2)]
    for number, part in enumerate(parts):
        mux = FRAGMENTS if suffix == "mp4" else {}
        assert write(part, codec, options, first=100 * number, mux=mux)
    path = folder / f"joined.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def restamped(path: Path, back: int) -> None:
    """Lowers the timestamps of the second half of a Matroska file by `back` milliseconds."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    for packet in packets[len(packets) // 2 :]:
        place = content.index(packet) - 3  # time since the start of the cluster, flags, then the packet
        (time,) = struct.unpack_from(">h", content, place)
        struct.pack_into(">h", content, place, time - back)
    path.write_bytes(content)


def check_all_policies(path: Path, frames: int) -> None:
    """All frames in order, whatever the policy, and the length that they have at 25 per second."""
    plain = plain_decode(path, SIDE)
    assert len(plain.images) == frames
    info = probe(path)
    assert (info.num_frames, info.duration) == (frames, pytest.approx(frames / 25, abs=0.01))
    for sampling in (
        SamplingConfig(frames=frames),
        SamplingConfig(policy="fps", fps=25.0, frames=frames),
        SamplingConfig(policy="llava", fps=25.0, frames=frames),
        SamplingConfig(policy="dynamic_fps1", min_frames=frames, max_frames=frames, multiple=1),
    ):
        clip = read_frames(path, sampling, size=SIDE)
        np.testing.assert_array_equal(clip.frames, plain.images)
        np.testing.assert_allclose(clip.times, np.arange(frames) / 25, atol=2e-3)
    seconds = 1 / 25 * (frames * 3 // 4)
    part = read_frames(path, SamplingConfig(frames=4), size=SIDE, bounds=(seconds, seconds + 0.15))
    np.testing.assert_array_equal(part.frames, plain.images[frames * 3 // 4 :][:4])


@pytest.mark.parametrize("keep", [2**26, 0], ids=["small", "large"])
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("h264-closed", "ts"), ("h264-open", "ts"), ("mpeg2-closed", "mpg"), ("h264-closed", "mp4")],
)
def test_timestamps_that_start_again(
    tmp_path: Path, name: str, suffix: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packet_index, "KEEP_BYTES", keep)
    hidden = 8 if suffix == "mp4" else 0  # ffmpeg hides the first fragment after a repeated header
    check_all_policies(joined(tmp_path, name, suffix), 2 * FRAMES - hidden)


@pytest.mark.parametrize(
    ("codec", "back"), [("h264-closed", 700), ("h264-open", 800), ("vp9-hidden", 40), ("vp9-hidden", 400)]
)
def test_timestamps_that_jump_back(tmp_path: Path, codec: str, back: int) -> None:
    path = tmp_path / "a.mkv"
    assert write(path, *STRUCTURES[codec])
    restamped(path, back)
    check_all_policies(path, FRAMES)


@pytest.mark.parametrize("name", ["h264-open", "h264-pyramid", "mpeg4-b", "mpeg2-open"])
@pytest.mark.parametrize("suffix", ["avi", "wmv", "mxf"])
def test_containers_without_presentation_times(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    if write(path, *STRUCTURES[name]):
        check_all_policies(path, FRAMES)
    else:
        assert suffix == "mxf"  # takes few codecs


def line(times: list[int], **more: list[int]) -> list[int]:
    """The laid-out times of packets of 40 ticks."""
    count = len(times)
    decoding = np.array(more["decoding"]) if "decoding" in more else None
    stamps = Timestamps(np.array(times), decoding, np.full(count, 40), np.ones(count, bool))
    return lay_out(stamps, reorders=True, longest_gap=1000, gap=40).times.tolist()


def test_segments_from_presentation_times_alone() -> None:
    """B-frames are no break, also when they are many; a frame before those that were shown is one."""
    b_frames = [0, 160, 80, 40, 120, 320, 240, 200, 280]
    assert line(b_frames) == b_frames
    first = [40 * number for number in range(30)]
    assert line(first + first) == [40 * number for number in range(60)]
    assert line([0, 40, 40, 40, 80]) == [0, 40, 80, 120, 160]


def test_a_single_damaged_time_begins_no_segment() -> None:
    first = [40 * number for number in range(40)]
    assert line([*first[:25], 200, *first[26:]]) == first
    lost = [*first[:25], 200, *[time + 4000 for time in first[26:]]]  # with many of its neighbours
    assert line(lost) == [*lost[:25], 1000, *lost[26:]]
    jumps = [*first[:25], *first[3:20]]
    assert line(jumps) == [40 * number for number in range(len(jumps))]


def test_segments_from_decoding_times() -> None:
    times, decoding = [80, 240, 160, 80, 240, 160], [0, 40, 80, 0, 40, 80]
    assert line(times, decoding=decoding) == [80, 240, 160, 280, 440, 360]
    far = [80, 120, 5000, 5040]
    assert line(far, decoding=far) == [80, 120, 160, 200]


def test_what_does_not_rise_comes_one_frame_later() -> None:
    assert rising(np.array([0, 40, 80, 40, 160, 160, 160]), gap=40).tolist() == [
        0,
        40,
        80,
        120,
        160,
        200,
        240,
    ]
