"""The list of packets from an mp4's tables is that of the packets themselves, or is left to them."""

import dataclasses
import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_files import SIZE, decode_all, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import packet_index
from crosslmm_jax.data.media.locate import Deadline, Media
from crosslmm_jax.data.media.mp4_tables import SampleTables, read_sample_tables
from crosslmm_jax.data.media.packet_index import open_indexed
from crosslmm_jax.data.media.video import probe, read_frames

B_FRAMES = {"g": "9", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}
FROM_TABLES: dict[str, dict[str, Any]] = {
    "b_frames.mp4": {"options": B_FRAMES},
    "quicktime.mov": {"options": B_FRAMES},
    "all_keys.mp4": {"options": {"g": "1"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "7", "bf": "2"}},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": {"g": "9", "deadline": "realtime", "cpu-used": "8"}},
    "tables_in_front.mp4": {"options": B_FRAMES, "mux": {"movflags": "faststart"}},
    "times_below_zero.mp4": {"options": B_FRAMES, "mux": {"movflags": "negative_cts_offsets"}},
    "no_edits.mp4": {"options": B_FRAMES, "mux": {"use_editlist": "0"}},
    "late.mp4": {"options": B_FRAMES, "ticks": [3000 + 40 * number for number in range(40)]},
    "variable.mp4": {"options": B_FRAMES, "ticks": np.cumsum(np.arange(40) % 7 * 30 + 20).tolist()},
    "one_frame.mp4": {"count": 1},
}
FROM_PACKETS: dict[str, dict[str, Any]] = {
    "fragments.mp4": {"mux": {"movflags": "frag_keyframe+empty_moov"}, "options": {"g": "9"}},
    "first_not_in_fragment.mp4": {"mux": {"movflags": "frag_keyframe"}, "options": {"g": "9"}},
    "matroska.mkv": {"options": B_FRAMES},
}


def forbid_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the test fail when the list is made by reading packets."""

    def fail(*_: object) -> None:
        raise AssertionError("the packets were read")

    monkeypatch.setattr(packet_index, "read_index", fail)


def write(folder: Path, name: str, kind: dict[str, Any]) -> Path:
    return write_video(folder / name, **{"count": 40, **kind})


def assert_same_frames(source: Path | Media, frames: np.ndarray, times: np.ndarray) -> None:
    """Some frames, all of them, and every one alone, against those of a plain decode."""
    path = str(source) if isinstance(source, Path) else source
    for count in (2, 7, 3 * len(frames)):
        clip = read_frames(path, SamplingConfig(frames=count), size=SIZE)
        chosen = np.abs(times[None] - clip.times[:, None]).argmin(1)
        np.testing.assert_allclose(times[chosen], clip.times, atol=1e-4)
        np.testing.assert_array_equal(clip.frames, frames[chosen])
        assert chosen[0] == 0 and chosen[-1] == len(frames) - 1
    for number, time in enumerate(times):
        clip = read_frames(path, SamplingConfig(frames=1), size=SIZE, bounds=(time - 1e-3, time + 1e-3))
        np.testing.assert_array_equal(clip.frames[0], frames[number])


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_TABLES)
def test_tables_tell_what_packets_tell(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, name, FROM_TABLES[name])
    with open_indexed(path, Deadline(path, 60), use_tables=False) as (_, expected):
        pass
    forbid_packets(monkeypatch)
    with open_indexed(path, Deadline(path, 60)) as (_, index):
        pass
    for field in dataclasses.fields(index):
        if field.name != "packets":
            wanted = getattr(expected, field.name)
            np.testing.assert_array_equal(getattr(index, field.name), wanted, field.name)
    frames, times = decode_all(path)
    assert probe(path).num_frames == len(frames)
    assert_same_frames(path, frames, times)


@pytest.mark.parametrize("name", FROM_PACKETS)
@pytest.mark.parametrize("keep", [True, False], ids=["small", "large"])
def test_what_tables_do_not_tell_is_read(
    tmp_path: Path, name: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not keep:
        monkeypatch.setattr(packet_index, "KEEP_BYTES", 0)
    path = write(tmp_path, name, FROM_PACKETS[name])
    assert_same_frames(path, *decode_all(path))
    forbid_packets(monkeypatch)
    with pytest.raises(AssertionError, match="the packets were read"):
        probe(path)


@pytest.mark.parametrize("start_s", [0.0, 0.24, 0.9])
@pytest.mark.parametrize("length_s", [0.3, 0.7, 9.0])
def test_edit_lists(tmp_path: Path, start_s: float, length_s: float) -> None:
    """An edit list that begins within the video, or ends it early: frames outside are hidden."""
    path = write(tmp_path, "a.mp4", {"options": B_FRAMES, "rotation": 90})
    content = bytearray(path.read_bytes())
    edit = (
        content.index(b"elst") + 12
    )  # how long in the ticks of the film, where it begins in those of the track
    length, start = struct.unpack_from(">Ii", content, edit)
    scale = length / 1.6
    ticks = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)[0]
    struct.pack_into(
        ">Ii", content, edit, min(length, round(length_s * scale)), start + round(start_s * ticks)
    )
    path.write_bytes(content)
    frames, times = decode_all(path)
    info = probe(path)
    assert (len(frames) < 40) == (start_s > 0 or length_s < 1.6)
    assert (info.num_frames, info.rotation) == (len(frames), 90)
    assert_same_frames(path, frames, times)


def test_parts_of_files_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.mp4", {"options": B_FRAMES})
    frames, times = decode_all(path)
    content = path.read_bytes()
    (tmp_path / "b.tar").write_bytes(b"\x00" * 700 + content + content[:5000])
    forbid_packets(monkeypatch)
    assert_same_frames(Media(str(tmp_path / "b.tar"), "a.mp4", 700, len(content)), frames, times)
    assert_same_frames(Media(str(tmp_path / "b.tar"), "a.mp4", data=content), frames, times)


def shifted(tables: SampleTables, number: int, ticks: int) -> SampleTables:
    delays = tables.delays.copy()
    delays[number] += ticks
    return tables._replace(delays=delays)


def test_wrong_tables_give_no_wrong_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a frame in the middle cannot be checked before it is read; what does not fit is read anew."""
    path = write(tmp_path, "a.mp4", {"options": {"g": "10", "bf": "0"}})
    frames, _ = decode_all(path)
    for number in (1, 20, 25, 38, 39):
        monkeypatch.setattr(
            packet_index,
            "read_sample_tables",
            lambda *arguments, number=number: shifted(read_sample_tables(*arguments), number, 100),  # type: ignore[arg-type]
        )
        clip = read_frames(path, SamplingConfig(frames=40), size=SIZE)
        np.testing.assert_array_equal(clip.frames, frames)
        np.testing.assert_allclose(clip.times, np.arange(40) / 25, atol=1e-4)


def test_damaged_tables_are_left_alone(tmp_path: Path) -> None:
    """Whatever the bytes, the tables are read or declined, within bounds, without an error."""
    content = write(tmp_path, "a.mp4", {"options": B_FRAMES}).read_bytes()
    begin = content.index(b"moov") - 4
    rng = random.Random(0)
    declined = 0
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(begin, len(content))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
        file = io.BytesIO(damaged[: rng.choice([len(damaged), rng.randrange(len(damaged))])])
        tables = read_sample_tables(file, len(file.getvalue()), 1)
        declined += tables is None
        assert tables is None or len({len(column) for column in tables}) == 1
    assert 100 < declined < 500
