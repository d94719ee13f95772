"""Which files may be opened and how long it may take; folders of pictures and gifs as videos."""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from video_files import assert_same, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media import demux, packet_index
from crosslmm_jax.data.media import locate as media
from crosslmm_jax.data.media.image import read_image
from crosslmm_jax.data.media.locate import Media, MediaOptions, resolve_path
from crosslmm_jax.data.media.video import probe, read_frames
from crosslmm_jax.errors import DataError

SIZE = 24
FOUR = SamplingConfig(frames=4)


def reason_of(path: Path, **options: float) -> str:
    with pytest.raises(DataError) as caught:
        read_frames(path, FOUR, size=SIZE, **options)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return caught.value.fault.reason


def test_resolve_keeps_to_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "rooted"  # one name begins with the other
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (outside / "x.mp4").write_bytes(b"x")
    (root / "a" / "in.mp4").write_bytes(b"x")
    (root / "inner").symlink_to(root / "a")
    (root / "outer").symlink_to(outside)
    (root / "link.mp4").symlink_to(outside / "x.mp4")
    assert resolve_path(str(root), "a/in.mp4") == str(root / "a/in.mp4")
    assert resolve_path(str(root), "inner/in.mp4") == str(root / "inner/in.mp4")
    assert resolve_path(str(root), "a/two..dots.mp4") == str(root / "a/two..dots.mp4")
    bad = [
        "../rooted/x.mp4",
        "a/../../rooted/x.mp4",
        str(root / "a/in.mp4"),
        "/etc/passwd",
        "outer/x.mp4",
        "link.mp4",
    ]
    for reference in bad:
        with pytest.raises(DataError) as caught:
            resolve_path(str(root), reference)
        assert caught.value.fault.reason == "outside_root"
        assert os.path.join(root, reference) == resolve_path(str(root), reference, allow_outside=True)
    for reference in ("", "a\0b"):
        with pytest.raises(DataError) as caught:
            resolve_path(str(root), reference, allow_outside=True)
        assert caught.value.fault.reason == "missing"
    alias = tmp_path / "alias"
    alias.symlink_to(root)
    assert resolve_path(str(alias), "a/in.mp4") == str(alias / "a/in.mp4")


def test_pipes_sockets_and_devices_are_not_opened(tmp_path: Path) -> None:
    for suffix in (".mp4", ".png"):
        pipe = tmp_path / f"pipe{suffix}"
        os.mkfifo(pipe)
        assert reason_of(pipe) == "not_a_file"
        (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
        assert reason_of(tmp_path / f"device{suffix}") == "not_a_file"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / f"s{suffix}"))
            assert reason_of(tmp_path / f"s{suffix}") == "not_a_file"


def test_lists_of_other_files_are_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "good.ts", 10)
    target = tmp_path / "good.ts"
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    with av.open(str(tmp_path / "list.m3u8")) as container:  # without the restriction it opens
        assert container.format.name == "hls"
    assert reason_of(tmp_path / "list.m3u8") == "wrong_type"
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good.ts\n")
    assert reason_of(tmp_path / "list.mp4") == "wrong_type"
    Image.new("RGB", (8, 8)).save(tmp_path / "frame-001.png")
    video = write_video(tmp_path / "frame-001.mp4", 10)
    (tmp_path / "frame-001.png").rename(tmp_path / "frame-%03d.mp4")
    assert probe(tmp_path / "frame-%03d.mp4").num_frames == 1 and probe(video).num_frames == 10


def test_a_name_is_never_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", 10)
    name = Path("concat:a.mp4|a.mp4")
    (tmp_path / "a.mp4").rename(tmp_path / name)
    assert probe(name).num_frames == 10


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_names_and_titles_need_not_be_utf8(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"a{suffix}", 10)
    expected = read_frames(path, FOUR, size=SIZE)
    content = path.read_bytes()
    spoiled = content.replace(b"VideoHandler", b"Vid\xe9oHandler").replace(b"Lavf", b"L\xe9vf")
    assert spoiled != content
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9" + os.fsencode(suffix)))
    name.write_bytes(spoiled)
    assert_same(read_frames(name, FOUR, size=SIZE), expected)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_only_standing_still_is_limited(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is ever so slow a file is read all the same: it does not stop."""
    path = write_video(tmp_path / f"a{suffix}", 60)
    assert reason_of(path, deadline_s=0.0) == "timeout"
    assert len(read_frames(path, FOUR, size=SIZE, deadline_s=None).frames) == 4
    clock = itertools.count(0, 7)  # every look at the clock takes seven seconds
    monkeypatch.setattr(media, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert len(read_frames(path, FOUR, size=SIZE, deadline_s=8.0).frames) == 4 and next(clock) > 280
    assert reason_of(path, deadline_s=6.0) == "timeout"
    looks = iter([0, 1, 2, 3, *[100] * 1000])
    monkeypatch.setattr(media, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    assert reason_of(path, deadline_s=90.0) == "timeout"
    assert len(list(looks)) == 999  # it stopped at once


def test_packets_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a damaged file in which ffmpeg goes round in circles, and so never stands still."""
    path = write_video(tmp_path / "a.mkv", 20)
    real = demux._demux
    monkeypatch.setattr(demux, "_demux", lambda stream: itertools.cycle(list(real(stream))))
    assert reason_of(path) == "corrupt"
    monkeypatch.undo()
    for suffix in (".mkv", ".mp4"):
        path = write_video(tmp_path / f"b{suffix}", 20)
        monkeypatch.setattr(packet_index, "MOST_REPEATS", 0.1)
        assert reason_of(path) == "corrupt"
        monkeypatch.undo()


def test_folder_of_pictures_is_a_video_of_one_frame_a_second(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in (1, 2, 10, 9, 11):
        Image.new("RGB", (20, 10), (number, 0, 0)).save(folder / f"clip_7_{number}.png")
    (folder / "notes.txt").write_text("no picture")
    info = probe(folder)
    assert (info.num_frames, info.duration, info.fps, info.codec) == (5, 5.0, 1.0, "png")
    assert (info.width, info.height, info.keyframe_spacing) == (20, 10, 1.0)
    assert info.size_bytes == sum(path.stat().st_size for path in folder.glob("*.png"))
    clip = read_frames(folder, SamplingConfig(policy="fps", fps=1.0, frames=8), size=SIZE)
    assert clip.frames[:, 0, 0, 0].tolist() == [1, 2, 9, 10, 11] and clip.duration == 5
    assert clip.times.tolist() == [0, 1, 2, 3, 4]
    clip = read_frames(folder, SamplingConfig(frames=2), size=SIZE, bounds=(1.0, 4.0))
    assert clip.frames[:, 0, 0, 0].tolist() == [2, 10] and clip.times.tolist() == [1, 3]
    clip = read_frames(folder, SamplingConfig(frames=1), size=SIZE, bounds=(1.2, 1.7))
    assert clip.frames[:, 0, 0, 0].tolist() == [2] and clip.duration == pytest.approx(0.5)
    assert read_frames(folder, SamplingConfig(frames=2), size=SIZE, bounds=(1, 2.5)).duration == 1.5
    (folder / "clip_7_10.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 99)
    with pytest.raises(DataError, match="clip_7_10.png") as caught:
        read_frames(folder, SamplingConfig(frames=5), size=SIZE)
    assert caught.value.fault.reason == "corrupt"


def test_a_folder_of_pictures_has_a_rate(tmp_path: Path) -> None:
    for number in range(9):
        Image.new("RGB", (SIZE, SIZE), (number, 0, 0)).save(tmp_path / f"{number:05d}.png")
    folder = Media(str(tmp_path), options=MediaOptions(folder_fps=3.0))
    info = probe(folder)
    assert (info.num_frames, info.duration, info.fps) == (9, 3.0, 3.0)
    assert info.keyframe_spacing == pytest.approx(1 / 3)
    clip = read_frames(folder, SamplingConfig(policy="fps", fps=3.0, frames=9), size=SIZE, bounds=(1.0, 2.0))
    assert clip.frames[:, 0, 0, 0].tolist() == [3, 4, 5] and clip.duration == pytest.approx(1)
    np.testing.assert_allclose(clip.times, [1, 4 / 3, 5 / 3], rtol=1e-6)
    every_second = read_frames(folder, SamplingConfig(policy="fps", fps=1.0, frames=9), size=SIZE)
    assert every_second.frames[:, 0, 0, 0].tolist() == [0, 3, 6]
    middles = SamplingConfig(policy="dynamic_fps1", min_frames=1, max_frames=8, multiple=1)
    assert read_frames(folder, middles, size=SIZE).frames[:, 0, 0, 0].tolist() == [1, 4, 7]


def test_a_video_among_pictures_is_named(tmp_path: Path) -> None:
    """A cover beside a film, or frames beside the film that they come from: either could be meant."""
    film = write_video(tmp_path / "film.mkv", 12)
    Image.new("RGB", (20, 10)).save(tmp_path / "cover.jpg")
    for read in (probe, lambda path: read_frames(path, FOUR, size=SIZE)):
        with pytest.raises(DataError, match="holds the video film.mkv; name that file, or move") as caught:
            read(tmp_path)
        assert caught.value.fault.reason == "wrong_type"
    assert probe(film).num_frames == 12
    film.rename(tmp_path.parent / f"{tmp_path.name}.mkv")
    assert probe(tmp_path).num_frames == 1


def test_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").mkdir()
    assert reason_of(tmp_path / "x.mp4") == "empty"
    with pytest.raises(DataError, match="is a folder"):
        read_image(tmp_path / "x.mp4", SIZE)


def test_gif_is_a_video(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    pictures = [Image.new("RGB", (16, 12), colour) for colour in colours]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100, 300, 100, 500])
    info = probe(path)
    assert (info.num_frames, info.width, info.height, info.codec) == (4, 16, 12, "gif")
    assert info.duration == pytest.approx(1.0, abs=0.011)
    clip = read_frames(path, SamplingConfig(policy="fps", fps=10.0, frames=10), size=SIZE)
    assert [tuple(pixel) for pixel in clip.frames[[0, 1, 3, 4, 5], 0, 0].tolist()] == [
        colours[0], colours[1], colours[1], colours[2], colours[3],
    ]  # fmt: skip


def test_probe_of_images(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    info = probe(tmp_path / "a.jpg")
    assert (info.num_frames, info.duration, info.width, info.height) == (1, 0.0, 30, 20)
    assert (info.codec, info.rotation) == ("jpeg", 270)
    assert info.size_bytes == (tmp_path / "a.jpg").stat().st_size
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    frame = read_frames(tmp_path / "a.jpg", FOUR, size=SIZE).frames[0]
    stored = np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE)))
    assert np.abs(frame.astype(int) - np.rot90(stored, info.rotation // 90)).mean() < 8


def test_a_picture_whose_name_tells_nothing(tmp_path: Path) -> None:
    for number, kind in enumerate(("jpeg", "png", "webp", "bmp")):
        path = tmp_path / ("COCO_val2014_7", "a.v2", "b.jfif", "c")[number]
        Image.new("RGB", (30, 20), (9, 9, 9)).save(path, kind)
        assert (probe(path).codec, probe(path).duration) == (kind, 0.0)
        assert len(read_frames(path, FOUR, size=SIZE).frames) == 1
    video = tmp_path / "video"
    video.write_bytes(write_video(tmp_path / "a.mp4", 12).read_bytes())
    assert probe(video).num_frames == 12 and len(read_frames(video, FOUR, size=SIZE).frames) == 4
    (tmp_path / "text").write_text("no picture")
    with pytest.raises(DataError, match="text: cannot be decoded") as caught:
        probe(tmp_path / "text")
    assert caught.value.fault.reason == "wrong_type"


def test_what_no_reader_knows_is_told_in_words_for_people(tmp_path: Path) -> None:
    """The same each time: PIL's own name the address of an object."""
    for content, words in (
        (b"text", "it is not a picture"),
        (b"\x89PNG\r\n\x1a\nx", "damaged at its beginning"),
    ):
        (tmp_path / "a.png").write_bytes(content)
        for medium in (str(tmp_path / "a.png"), Media(str(tmp_path / "a.png"), "b.png", data=content)):
            with pytest.raises(DataError) as caught:
                probe(medium)
            assert str(caught.value) == f"{medium}: cannot be read as an image ({words}); replace the file"


def test_reading_goes_on_where_a_stream_begins_within_the_file() -> None:
    """PyAV raises IndexError there, on damaged transport streams among others."""
    parts = [iter([1, 2]), iter([3])]

    class Container:
        def demux(self, stream: object) -> Iterator[int]:
            part = parts.pop(0)
            yield from part
            if parts:
                raise IndexError

    class Stream:
        container = Container()

    assert list(demux._demux(Stream())) == [1, 2, 3]


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    for path in (write_video(tmp_path / "a.mp4", 3), tmp_path / "a.png"):
        path.touch()
        path.write_bytes(b"x")
        path.chmod(0)
        assert reason_of(path) == "other"
