"""One damaged packet costs one frame; a file is refused by its share of damage, whatever is read of it."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pytest
from plain_decode import plain_decode
from video_files import Collected, packet_spans, spoil_packets, transport_packets, write_video
from zoo import FRAMES, SIDE, STRUCTURES, write

from crosslmm_jax.config import ConfigError, DataConfig, SamplingConfig
from crosslmm_jax.data.media import demux, packet_index, video
from crosslmm_jax.data.media.decoding import SeekError, decode, frame_store, nal_units
from crosslmm_jax.data.media.locate import Media
from crosslmm_jax.data.media.video import probe, read_frames
from crosslmm_jax.errors import DataError


@pytest.fixture
def one_bad(tmp_path: Path) -> Path:
    path = tmp_path / "onebad.mp4"
    assert write(path, *STRUCTURES["h264-open"])
    spoil_packets(path, [20])
    return path


@pytest.fixture
def broadcast(tmp_path: Path) -> Path:
    """One that lost a transport packet on its way."""
    path = tmp_path / "a.ts"
    assert write(path, "libx264", {"g": "1"})
    packets = transport_packets(path.read_bytes())
    del packets[len(packets) // 2]
    path.write_bytes(b"".join(packets))
    return path


@pytest.mark.parametrize("frames", [1, 2, 3, 8, 16, FRAMES])
def test_one_damaged_packet_costs_one_frame(one_bad: Path, frames: int) -> None:
    plain = plain_decode(one_bad, SIDE)
    assert (len(plain.images), plain.errors, plain.corrupt) == (FRAMES - 1, 1, 0)
    assert probe(one_bad).damaged == 1
    clip = read_frames(one_bad, SamplingConfig(frames=frames), size=SIDE)
    np.testing.assert_array_equal(clip.frames, plain.images[plain.at(clip.times)])
    assert len(clip.frames) == frames and clip.damaged in (0, 1)
    if frames == FRAMES:
        assert clip.damaged == 1
        lost = int(np.flatnonzero((clip.frames[1:] == clip.frames[:-1]).all((1, 2, 3)))[0])
        np.testing.assert_array_equal(clip.frames[lost + 1], clip.frames[lost])  # the frame before is shown


def test_a_damaged_packet_that_is_not_wanted(one_bad: Path) -> None:
    """In a GOP of its own it is not even met."""
    clip = read_frames(one_bad, SamplingConfig(frames=2), size=SIDE, bounds=(0, 0.2))
    assert clip.damaged == 0


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.5])
def test_the_share_of_the_file_decides(tmp_path: Path, limit: float) -> None:
    path = tmp_path / "a.mp4"
    assert write(path, *STRUCTURES["h264-every"])
    spoil_packets(path, list(range(0, FRAMES, 4)))
    refused = limit < 0.25
    for frames in (3, 8, 16, FRAMES):
        if refused:
            with pytest.raises(DataError, match="10 of its 40 frames are lost") as caught:
                read_frames(path, SamplingConfig(frames=frames), size=SIDE, max_damaged=limit)
            assert caught.value.fault.reason == "corrupt"
        else:
            clip = read_frames(path, SamplingConfig(frames=frames), size=SIDE, max_damaged=limit)
            assert (len(clip.frames), clip.damaged) == (frames, 10)
    if refused:
        with pytest.raises(DataError, match="10 of its 40 frames are lost") as caught:
            probe(path, max_damaged=limit)
        assert caught.value.fault.reason == "corrupt"
    else:
        assert probe(path, max_damaged=limit).damaged == 10


def test_damage_that_is_known_is_not_passed_by(one_bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Met somewhere, it is counted, and a file with a count is decoded whole whatever is read of it."""
    assert probe(one_bad, decode_up_to=10).damaged == 1
    monkeypatch.setattr(video, "GopDecoder", None)
    medium = Media(str(one_bad), damaged=1)
    clip, plain = (
        read_frames(medium, SamplingConfig(frames=2), size=SIDE, bounds=(0, 0.2)),
        plain_decode(one_bad, SIDE),
    )
    np.testing.assert_array_equal(clip.frames, plain.images[plain.at(clip.times)])
    assert clip.damaged == 1


def test_very_long_videos_are_counted_on_request(one_bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "WHOLE_UP_TO", 20)
    assert probe(one_bad, decode_up_to=10).damaged is None
    with pytest.raises(DataError, match="1 of its 40 frames are lost, above max_damaged, 0"):
        probe(one_bad, decode_up_to=10, max_damaged=0.0)
    assert probe(one_bad, decode_up_to=0, max_damaged=0.0).damaged is None
    assert probe(one_bad, decode_up_to=FRAMES).damaged == 1
    assert probe(one_bad, decode_up_to=None).damaged == 1


def test_the_limit_is_a_setting() -> None:
    assert DataConfig(index="a", tokenizer="b", batch_size=1).max_damaged == 0.1
    with pytest.raises(ConfigError, match="max_damaged"):
        DataConfig(index="a", tokenizer="b", batch_size=1, max_damaged=1.5)


def test_a_file_without_its_end(tmp_path: Path) -> None:
    """Packets that the tables list and the file does not hold are lost frames."""
    path = tmp_path / "a.mp4"
    codec, options = STRUCTURES["h264-every"]
    assert write(path, codec, options, mux={"movflags": "faststart"})
    whole, spans = path.read_bytes(), packet_spans(path)
    path.write_bytes(whole[: spans[-2][0]])
    assert probe(path).damaged == 2
    assert read_frames(path, SamplingConfig(frames=FRAMES), size=SIDE).damaged == 2
    path.write_bytes(whole[: spans[FRAMES // 2][0]])
    for read in (lambda: probe(path), lambda: read_frames(path, SamplingConfig(frames=1), size=SIDE)):
        with pytest.raises(DataError, match="20 of its 40 frames are lost") as caught:
            read()
        assert caught.value.fault.reason == "truncated"


def test_flagged_packets_of_a_broadcast(broadcast: Path) -> None:
    """ffmpeg flags a packet with a lost part. The file is read, and the flag shows in the count."""
    plain = plain_decode(broadcast, SIDE)
    count = probe(broadcast).damaged
    assert count is not None and 1 <= count <= 2
    for frames in (1, 2, 7, FRAMES):
        clip = read_frames(broadcast, SamplingConfig(frames=frames), size=SIDE)
        assert clip.damaged == count
        np.testing.assert_array_equal(clip.frames, plain.images[plain.at(clip.times)])


def test_packets_that_no_other_needs(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    assert write(path, "libx264", {"g": "12", "bf": "2", "x264-params": "b-pyramid=0:scenecut=0:b-adapt=0"})
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert nal_units.knows_references(context)
        packets = [packet for packet in container.demux(video=0) if packet.size]
        unreferenced = [nal_units.is_unreferenced(packet, "h264") for packet in packets]
        assert unreferenced[:7] == [False, False, True, True, False, True, True]
        content = bytearray(bytes(packets[2]))
        for place, value in ((0, 0x7F), (4, content[4] | 0x60), (4, 0x80)):  # longer, referenced, forbidden
            spoiled = bytearray(content)
            spoiled[place] = value
            assert not nal_units.is_unreferenced(av.Packet(bytes(spoiled)), "h264")


def test_where_ffmpeg_cannot_read_on_the_file_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mkv"
    assert write(path, *STRUCTURES["h264-closed"])
    plain = plain_decode(path, SIDE)
    original = demux._demux

    def stopping(stream: Any) -> Iterator[Any]:
        yield from itertools.islice(original(stream), FRAMES - 3)
        raise av.error.InvalidDataError(1094995529, "Invalid data found")

    monkeypatch.setattr(demux, "_demux", stopping)
    for keep in (2**26, 0):
        monkeypatch.setattr(packet_index, "KEEP_BYTES", keep)
        info = probe(path)
        assert info.num_frames == FRAMES - 3
        clip = read_frames(path, SamplingConfig(frames=FRAMES - 3), size=SIDE)
        np.testing.assert_array_equal(clip.frames, plain.images[: FRAMES - 3])


def test_a_long_broadcast_with_few_damaged_packets_is_not_decoded_whole(
    broadcast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_decode(broadcast, SIDE)
    monkeypatch.setattr(video, "WHOLE_UP_TO", 10)
    monkeypatch.setattr(video, "PlainDecode", None)
    clip = read_frames(broadcast, SamplingConfig(frames=2), size=SIDE)
    np.testing.assert_array_equal(clip.frames, plain.images[plain.at(clip.times)])
    with pytest.raises(DataError, match="1 of its 40 frames are lost, above max_damaged, 0"):
        read_frames(broadcast, SamplingConfig(frames=2), size=SIDE, max_damaged=0.0)


def test_a_count_of_the_index_decides_whatever_is_read(
    one_bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a long video, where nothing is estimated then."""
    with pytest.raises(DataError, match="5 of its 40 frames are lost, above max_damaged, 0.1"):
        read_frames(Media(str(one_bad), damaged=5), SamplingConfig(frames=2), size=SIDE, bounds=(0, 0.2))
    monkeypatch.setattr(video, "WHOLE_UP_TO", 10)
    plain = plain_decode(one_bad, SIDE)
    for known, estimate in ((None, video.estimate_damaged), (1, None)):
        monkeypatch.setattr(video, "estimate_damaged", estimate)
        clip = read_frames(Media(str(one_bad), damaged=known), SamplingConfig(frames=FRAMES), size=SIDE)
        np.testing.assert_array_equal(clip.frames, plain.images[plain.at(clip.times)])
        assert 1 <= clip.damaged <= 2


def test_a_consumer_begins_anew_when_a_long_video_is_decoded_whole_after_all(
    one_bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has frames of the attempt before, which may not be replaced."""

    def fails_at_the_end(*arguments: Any) -> None:
        from_whole_gops(*arguments)
        raise SeekError

    from_whole_gops = video.take_from_whole_gops
    monkeypatch.setattr(video, "take_from_whole_gops", fails_at_the_end)
    monkeypatch.setattr(video, "WHOLE_UP_TO", 10)
    monkeypatch.setattr(frame_store, "MOST_WAITING", 8)
    consumer, plain = Collected(4), plain_decode(one_bad, SIDE)
    clip = read_frames(one_bad, SamplingConfig(frames=FRAMES), size=SIDE, consumer=consumer, keep=False)
    np.testing.assert_array_equal(consumer.frames, plain.images[plain.at(clip.times)])
    assert clip.damaged == 1


def test_a_read_reports_the_damage_that_it_meets(one_bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a very long video whose damage all of the 32 places miss."""
    monkeypatch.setattr(video, "WHOLE_UP_TO", 10)
    monkeypatch.setattr(video, "estimate_damaged", lambda *_: 0)
    assert read_frames(one_bad, SamplingConfig(frames=FRAMES), size=SIDE).damaged == 1


@pytest.mark.slow
def test_a_very_long_damaged_video_is_not_decoded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read is what a plain decode shows, from a GOP before; only too much damage is counted."""
    monkeypatch.setattr(packet_index, "KEEP_BYTES", 0)
    monkeypatch.setattr(video, "WHOLE_UP_TO", 1500)
    frames, rng = 2000, random.Random(0)
    options = {"preset": "ultrafast", "g": "20", "bf": "2", "x264-params": "scenecut=0"}
    path = write_video(tmp_path / "a.mp4", frames, width=32, height=32, options=options)
    whole, spoiled = path.read_bytes(), sorted(rng.sample(range(frames), frames // 50))
    spoil_packets(path, spoiled)
    plain = plain_decode(path, SIDE)
    decoded: list[int] = []
    original = decode.decode_packet

    def noted(*arguments: Any) -> Any:
        decoded.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(decode, "decode_packet", noted)
    with monkeypatch.context() as patch:
        patch.setattr(video, "PlainDecode", None)
        assert probe(path).damaged is None and len(decoded) <= 256 + 32 + 40
        met = 0
        for number in [spoiled[5], spoiled[20] + 1, *rng.sample(range(frames), 12)]:
            decoded.clear()
            bounds = (number / 25 - 0.01, number / 25 + 0.01)
            clip = read_frames(
                Media(str(path), damaged=40), SamplingConfig(frames=1), size=SIDE, bounds=bounds
            )
            np.testing.assert_array_equal(clip.frames, plain.images[plain.at(clip.times)])
            assert len(decoded) < 300
            met += clip.damaged == 40
        assert met >= 2
        estimated = read_frames(path, SamplingConfig(frames=64), size=SIDE).damaged
        assert 5 <= estimated <= 120
    path.write_bytes(whole)
    spoil_packets(path, list(range(0, frames, 3)))
    for read in (lambda: probe(path), lambda: read_frames(path, SamplingConfig(frames=8), size=SIDE)):
        with pytest.raises(DataError, match="of its 2000 frames are lost, above max_damaged, 0.1") as caught:
            read()
        assert caught.value.fault.reason == "corrupt"
