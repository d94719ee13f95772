"""Media within tars: the same frames as from files of their own, nothing else of the tar, nothing outside."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from lookalikes import write_tar
from PIL import Image
from video_files import assert_same, write_video

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.index.table import RowStore, open_index
from crosslmm_jax.data.media import locate as media
from crosslmm_jax.data.media.archives.tar import tar_member
from crosslmm_jax.data.media.locate import direct_reference, open_file, open_media, size_of
from crosslmm_jax.data.media.video import probe, read_frames
from crosslmm_jax.errors import DataError

FOUR = SamplingConfig(frames=4)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Media of several kinds, and the same in `all.tar`, between other things."""
    write_video(tmp_path / "a.mp4", 40)
    write_video(tmp_path / "b.mkv", 30)
    write_video(tmp_path / "c.ts", 30)
    pictures = [Image.new("RGB", (16, 12), (40 * number, 0, 0)) for number in range(4)]
    pictures[3].save(tmp_path / "d.png")
    pictures[0].save(tmp_path / "e.gif", save_all=True, append_images=pictures[1:], duration=100)
    names = ["a.mp4", "b.mkv", "c.ts", "d.png", "e.gif"]
    content = {name: (tmp_path / name).read_bytes() for name in names}
    padded = {"0.txt": b"\x47" * 999}
    for number, name in enumerate(names):
        padded |= {f"x/{name}": content[name], f"{number}.bin": os.urandom(700)}
    write_tar(tmp_path / "all.tar", padded)
    return content


def test_members_read_as_files_do(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        reference = f"all.tar::x/{name}"
        medium = open_media(str(tmp_path), reference)
        assert (size_of(medium), str(medium)) == (len(content), f"{tmp_path}/{reference}")
        with open_file(medium) as file:
            assert file.read() == content and file.read(1) == b""
            assert file.seek(-7, os.SEEK_END) == len(content) - 7 and file.read() == content[-7:]
            assert file.seek(5) == 5 and file.seek(2, os.SEEK_CUR) == 7 and file.read(9) == content[7:16]
        assert probe(medium) == probe(tmp_path / name)
        assert_same(read_frames(medium, FOUR, size=24), read_frames(tmp_path / name, FOUR, size=24))
        direct = direct_reference(reference, medium)
        assert direct == f"all.tar::{tar_member(f'x/{name}', medium.offset, len(content))}"
        assert open_media(str(tmp_path), direct) == medium
        assert direct_reference(direct, medium) == direct


def test_large_videos_are_read_twice_from_a_member(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = read_frames(tmp_path / "a.mp4", FOUR, size=24)
    monkeypatch.setattr("crosslmm_jax.data.media.packet_index.KEEP_BYTES", 0)
    assert_same(read_frames(open_media(str(tmp_path), "all.tar::x/a.mp4"), FOUR, size=24), wanted)


def test_a_member_is_read_without_the_rest_of_the_tar(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tar of a gigabyte, of which nearly all is a hole: its header and it are read, and nothing more."""
    path = tmp_path / "large.tar"
    content = files["a.mp4"]
    hole = tarfile.TarInfo("hole.bin")
    hole.size = 2**30
    last = tarfile.TarInfo("v.mp4")
    last.size = len(content)
    with open(path, "wb") as file:
        file.write(hole.tobuf())
        file.seek(hole.size, os.SEEK_CUR)
        file.write(last.tobuf() + content + b"\0" * (-len(content) % 512 + 1024))
    reference = f"large.tar::{tar_member('v.mp4', 512 + 2**30 + 512, len(content))}"
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the tar is walked through"))
    begin = _bytes_read()
    clip = read_frames(open_media(str(tmp_path), reference), FOUR, size=24)
    assert len(clip.frames) == 4
    assert _bytes_read() - begin < 3 * len(content) + 2**18


def _bytes_read() -> int:
    """By this process so far, from files and pipes."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def test_nothing_stays_open(tmp_path: Path, files: dict[str, bytes]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in files:
        medium = open_media(str(tmp_path), f"all.tar::x/{name}")
        read_frames(medium, FOUR, size=24)
        with pytest.raises(DataError):
            read_frames(medium._replace(length=10), FOUR, size=24)
    assert len(os.listdir("/proc/self/fd")) == before


def reason_of(root: Path, reference: str) -> str:
    with pytest.raises(DataError) as caught:
        read_frames(open_media(str(root), reference), FOUR, size=24)
    assert "\n" not in str(caught.value)
    return caught.value.fault.reason


def test_tars_and_members_that_cannot_be_read(tmp_path: Path, files: dict[str, bytes]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    content = (tmp_path / "all.tar").read_bytes()
    (root / "a.tar").write_bytes(content)
    place = open_media(str(root), "a.tar::x/a.mp4")
    direct = direct_reference("a.tar::x/a.mp4", place)
    assert reason_of(root, "a.tar::y.mp4") == "missing"
    assert reason_of(root, "none.tar::y.mp4") == "missing"
    assert (
        reason_of(root, f"a.tar::{tar_member('x/a.mp4', place.offset + 512, place.length or 0)}") == "changed"
    )
    assert reason_of(root, f"a.tar::{tar_member('x/a.mp4', place.offset, 99)}") == "changed"
    assert reason_of(root, f"a.tar::{tar_member('x/a.mp4', 3, 99)}") == "changed"
    (root / "cut.tar").write_bytes(content[: place.offset + 100])
    assert reason_of(root, direct.replace("a.tar", "cut.tar")) == "truncated"
    (root / "zip.tar").write_bytes(b"PK" + os.urandom(2000))
    assert reason_of(root, "zip.tar::x/a.mp4") == "corrupt"
    os.mkfifo(root / "pipe.tar")
    assert reason_of(root, "pipe.tar::x/a.mp4") == "not_a_file"
    (root / "folder.tar").mkdir()
    assert reason_of(root, "folder.tar::x/a.mp4") == "not_a_file"
    (root / "empty.tar").touch()
    assert reason_of(root, "empty.tar::x/a.mp4") == "empty"
    write_tar(root / "nothing.tar", {"a.mp4": b""})
    assert reason_of(root, "nothing.tar::a.mp4") == "empty"


def test_tars_and_their_members_lead_nowhere_else(tmp_path: Path, files: dict[str, bytes]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.tar").symlink_to(tmp_path / "all.tar")
    for reference in ("link.tar::x/a.mp4", "../all.tar::x/a.mp4", f"{tmp_path}/all.tar::x/a.mp4"):
        assert reason_of(root, reference) == "outside_root"
        assert open_media(str(root), reference, allow_outside=True).length == len(files["a.mp4"])
    with tarfile.open(root / "links.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo("link.mp4")
            member.type, member.linkname = kind, str(tmp_path / "a.mp4")
            tar.addfile(member)
        outside = tarfile.TarInfo("../../b.mp4")
        outside.size = len(files["a.mp4"])
        tar.addfile(outside, io.BytesIO(files["a.mp4"]))
    assert reason_of(root, "links.tar::link.mp4") == "missing"
    assert reason_of(root, f"links.tar::{tar_member('link.mp4', 512, 0)}") == "changed"
    medium = open_media(str(root), "links.tar::../../b.mp4")  # a name within the tar, and no more
    assert medium.path == str(root / "links.tar")
    assert_same(read_frames(medium, FOUR, size=24), read_frames(tmp_path / "a.mp4", FOUR, size=24))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{tmp_path / 'c.ts'}\n#EXT-X-ENDLIST\n"
    write_tar(root / "list.tar", {"list.mp4": playlist.encode(), "list.m3u8": playlist.encode()})
    for name in ("list.mp4", "list.m3u8"):
        assert reason_of(root, f"list.tar::{name}") == "wrong_type"


def test_links_in_folders_of_pictures(tmp_path: Path, files: dict[str, bytes]) -> None:
    root = tmp_path / "root"
    (root / "clip").mkdir(parents=True)
    (root / "0.png").write_bytes(files["d.png"])
    (root / "clip" / "0.png").symlink_to("../0.png")
    assert len(read_frames(open_media(str(root), "clip"), SamplingConfig(frames=1), size=24).frames) == 1
    (root / "clip" / "1.png").symlink_to(tmp_path / "d.png")
    assert reason_of(root, "clip") == "outside_root"
    assert open_media(str(root), "clip", allow_outside=True).path == str(root / "clip")


def test_only_tars_have_members(tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "a::b.mp4").write_bytes(files["a.mp4"])
    medium = open_media(str(tmp_path), "a::b.mp4")
    assert media.whole_file(medium) == str(tmp_path / "a::b.mp4")
    assert reason_of(tmp_path, "a.mp4::x/../../y") == "outside_root"


def test_the_index_knows_where_a_member_lies(
    tmp_path: Path, files: dict[str, bytes], tokenizer_folder: Path
) -> None:
    """No worker has to walk through a tar, however the annotation names its member."""
    turns = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B."}]
    rows = [{"image": "all.tar::x/d.png", "conversations": turns}, {"image": "d.png", "conversations": turns}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    reports = [
        build_index(str(tmp_path / "a.json"), tmp_path / "index", tokenizer=str(tokenizer_folder), quiet=True)
        for _ in range(2)
    ]
    assert [(report.rows, report.reused) for report in reports] == [(2, 0), (2, 2)]
    store = RowStore(open_index(tmp_path / "index"))
    member, file = store[0].media + store[1].media
    assert member == direct_reference("all.tar::x/d.png", open_media(str(tmp_path), member))
    assert "@" in member and file == "d.png"
