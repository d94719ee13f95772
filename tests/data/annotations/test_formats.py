"""Every format of annotations: rows and faults of look-alike files, options, and files that are refused."""

import io
import json
import math
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from crosslmm_jax.data.annotations.formats import FORMATS
from crosslmm_jax.data.annotations.mixture import read_mixture, read_rows
from crosslmm_jax.data.annotations.rows import DatasetSpec, Row
from crosslmm_jax.data.media import MediaOptions, open_media, probe
from crosslmm_jax.data.media.archives.tar import member_name, member_span
from crosslmm_jax.errors import DataError, Fault, UserError

# (modality, media, bounds) of a good row, the reason of a bad one, in order.
EXPECTED: dict[str, list[Any]] = {
    "llava": [
        ("image", ("a.jpg",), None), ("multi_image", ("a.jpg", "b.jpg"), None), ("text", (), None),
        ("video", ("one.mp4",), None), "placeholders", "outside_root", "conversation",
    ],
    "llava#2": [
        ("video", ("one.mp4",), (0.5, 1.5)), ("video", ("two.mp4",), None), "clip_times", "malformed",
    ],
    "frames": [("video", ("clip",), None)],
    "gifs": [("video", ("bar.gif",), None)],
    "videochat2": [
        ("video", ("one.mp4",), None), ("video", ("two.mp4",), (0.25, 1.75)), ("image", ("b.jpg",), None),
        "conversation",
    ],
    "moviechat": [
        ("video", ("AWA-1.mp4",), None), ("video", ("AWA-1.mp4",), (0.0, 1.0)), "clip_times",
        ("video", ("AWA-1.mp4",), None), "malformed",
    ],
    "vript": [
        ("video", ("vid0/vid0-Scene-001.mp4",), None), ("video", ("vid0/vid0-Scene-002.mp4",), None),
        "conversation",
    ],
    "moviechat_list": [
        ("video", ("AWA-1.mp4",), None), ("video", ("AWA-1.mp4",), (0.0, 1.0)), "clip_times",
        ("video", ("AWA-1.mp4",), None), "conversation",
    ],
    "vript_list": [
        ("video", ("vid0/vid0-Scene-001.mp4",), None), ("video", ("vid0/vid0-Scene-002.mp4",), None),
        "conversation", "malformed",
    ],
    "sharegpt4video": [("video", ("one.mp4",), None), "conversation"],
    "video_chatgpt": [("video", ("one.mp4",), None), "conversation"],
    "internvid": [
        ("video", ("dQw-invented.mp4",), (0.5, 1.25)), ("video", ("dQw-invented.mp4",), (1.0, 1.5)),
        "clip_times",
    ],
    "internvid_cut": [("video", ("k_00:00:01.000_00:00:02.000.mp4",), None), "conversation"],
    "shards": [
        ("video", ("shard-000.tar::v0.mp4",), (0.5, math.inf)), ("image", ("shard-000.tar::i0.jpg",), None),
        ("multi_image", tuple(f"shard-000.tar::long/{'n' * 120}.{number}.jpg" for number in (0, 1)), None),
        "malformed", "missing",
        ("image", ("shard-001.tar::i1.jpg",), None), "conversation",
        ("image", ("shard-002.tar::i1.jpg",), None), "malformed",
    ],
    "capsfusion": [
        ("image", ("00000/000000000.jpg",), None), "not_downloaded",
        ("image", ("00001/000010000.jpg",), None), "not_downloaded",
    ],
    "onevision": [
        ("image", ("train-00000.parquet::0/image",), None), ("text", (), None), "placeholders",
        ("multi_image", ("train-00001.parquet::0/images/0", "train-00001.parquet::0/images/1"), None),
        ("video", ("train-00002.parquet::0/video",), (0.5, math.inf)),
    ],
    "pictures": [
        ("image", ("invented-train.array_record-00000::0/image/0.jpg",), None), "conversation",
        ("image", ("invented-train.array_record-00001::0/image/0.jpg",), None),
    ],
    "clips": [
        ("video", ("invented-train.array_record-00000::1/film/0.mp4",), (0.25, 1.5)), "clip_times",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def read(lookalikes: Path) -> dict[str, list[Row | Fault]]:
    specs = read_mixture(str(lookalikes / "mixture.yaml"))
    return {spec.name: list(read_rows(spec, seed=0)) for spec in specs}


def good(rows: list[Row | Fault]) -> list[Row]:
    return [row for row in rows if isinstance(row, Row)]


def texts(row: Row) -> list[str]:
    return [turn.text for turn in row.turns]


def test_the_mixture_gives_the_expected_rows_and_faults(read: dict[str, list[Row | Fault]]) -> None:
    def brief(row: Row | Fault) -> Any:
        if isinstance(row, Fault):
            return row.reason
        return row.modality, tuple(map(member_name, row.media)), row.bounds

    found = {name: [brief(row) for row in rows] for name, rows in read.items()}
    assert found == EXPECTED
    assert FORMATS.keys() - EXPECTED.keys() == {
        "llava_parquet",
        "webdataset",
        "tfds",
    }  # their data sets are named after folders


def test_rows_are_numbered_and_named(read: dict[str, list[Row | Fault]], lookalikes: Path) -> None:
    for name, rows in read.items():
        first = 1 if name == "frames" else 0  # "end:1" of two
        assert [row.row for row in rows] == list(range(first, first + len(rows)))
        assert all(row.dataset == name and row.where.startswith(str(lookalikes)) for row in rows)
        assert len({row.where for row in rows}) == len(rows)


def test_media_of_good_rows_are_there(read: dict[str, list[Row | Fault]]) -> None:
    for row in [row for rows in read.values() for row in good(rows)]:
        for name in row.media:
            assert os.path.exists(os.path.join(row.root, name.partition("::")[0])), row.where


def test_conversations(read: dict[str, list[Row | Fault]]) -> None:
    two, caption, image = good(read["videochat2"])
    assert texts(two) == [
        "<image>\nWatch the video and answer.\nWhat moves?", "A bar.", "Where to?", "To the right.",
    ]  # fmt: skip
    assert texts(caption) == ["<image>\nDescribe the video.", "A bar moves."]
    assert texts(image) == ["<image>\nWhich colour?", "Orange."]
    every, moment, described = good(read["moviechat"])
    assert texts(every) == ["<image>\nDoes anything move?", "Yes.", "What?", "A bar."]
    assert texts(moment) == ["<image>\nWhere is it now?", "In the middle."]
    assert texts(described)[1] == "A bar crosses a grey field."
    assert texts(good(read["vript"])[1])[1] == "Bar 2 moves."
    assert texts(good(read["onevision"])[0]) == ["<image>\nWhat is it?", "A bar."]
    for name in ("moviechat", "vript"):
        assert list(map(texts, good(read[f"{name}_list"]))) == list(map(texts, good(read[name])))
    [caption], [answer] = good(read["sharegpt4video"]), good(read["video_chatgpt"])
    assert texts(caption) == ["<image>\nDescribe the video in detail.", "A bar crosses a grey field."]
    assert texts(answer) == ["<image>\nWhat moves?", "A bar."]
    assert texts(good(read["internvid"])[0])[1] == "a bar moves"
    assert texts(good(read["internvid_cut"])[0])[1] == "a bar that was cut out"
    assert [texts(row)[1] for row in good(read["capsfusion"])] == [
        "An orange bar, shard 00000.", "An orange bar, shard 00001.",
    ]  # fmt: skip


def test_spans_of_tar_members_hold_the_files(read: dict[str, list[Row | Fault]], lookalikes: Path) -> None:
    rows = good(read["shards"])
    assert [texts(row)[1] for row in rows] == ["A bar.", "An orange bar.", "Yes.", "A bar.", "A bar."]
    originals = {".mp4": lookalikes / "media" / "one.mp4", ".jpg": lookalikes / "media" / "a.jpg"}
    for name in [name for row in rows for name in row.media]:
        file, _, member = name.partition("::")
        tar = str(lookalikes / "shards" / file)
        offset, length = member_span(tar, member)
        content = (lookalikes / "shards" / file).read_bytes()[offset : offset + length]
        assert content == originals[Path(member_name(member)).suffix].read_bytes()
        if file != "shard-002.tar":  # damaged, so it has no table
            assert member_span(tar, member_name(member)) == (offset, length)


@pytest.mark.parametrize(
    ("tar", "member", "words"),
    [
        ("shard-000.tar", "none.mp4", "holds no file none.mp4"),
        ("shard-000.tar", "v0.mp4@0+10", "does not lie at byte 0"),
        ("shard-000.tar", "v0.mp4@512+10", "does not lie at byte 512"),
        ("shard-000.tar", "v0.mp4@99999999+10", "does not lie at byte 99999999"),
        ("shard-002.tar", "i1.jpg", "cannot be read as a tar"),
        ("gone.tar", "i1.jpg", "cannot be read"),
        ("gone.tar", "i1.jpg@512+3", "cannot be read"),
    ],
)
def test_members_that_are_not_there(lookalikes: Path, tar: str, member: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        member_span(str(lookalikes / "shards" / tar), member)
    assert words in str(caught.value)


def test_a_damaged_header_ends_a_tar_with_a_fault(lookalikes: Path, tmp_path: Path) -> None:
    content = bytearray((lookalikes / "shards" / "shard-000.tar").read_bytes())
    content[content.index(b"x1.txt") + 150] ^= 1  # in its checksum
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    read = [row for spec in read_mixture(f"{tmp_path}/*.tar") for row in read_rows(spec, seed=0)]
    assert [type(row) for row in read] == [Row, Row, Row, Fault, Fault]
    details = [row.detail for row in read if isinstance(row, Fault)]
    assert "is damaged at byte" in details[0] and "unpack it if it is compressed" in details[1]


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1), flips=st.integers(0, 255), cut=st.booleans())
def test_no_damage_to_a_tar_is_fatal(lookalikes: Path, where: float, flips: int, cut: bool) -> None:
    content = bytearray((lookalikes / "shards" / "shard-000.tar").read_bytes())
    headers = [
        start for start in range(0, len(content), 512) if content[start + 257 : start + 262] == b"ustar"
    ]
    place = int(where * (len(content) - 1)) if cut else headers[int(where * (len(headers) - 1))]
    if cut:
        del content[place:]
    else:
        content[place + flips] ^= 0xFF
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.tar").write_bytes(content)
        Path(folder, "b.tar").write_bytes((lookalikes / "shards" / "shard-001.tar").read_bytes())
        spec = DatasetSpec("x", f"{folder}/*.tar", "webdataset", folder)
        read = list(read_rows(spec, seed=0))
    assert [row.media[0][:13] for row in good(read)][-1:] == ["b.tar::i1.jpg"]


def rows_of(folder: Path, kind: str, file: str, **options: Any) -> list[Row | Fault]:
    spec = DatasetSpec("x", str(folder / file), kind, str(folder / "media"), options=options)
    return list(read_rows(spec, seed=0))


def test_options(lookalikes: Path) -> None:
    parts = ["shot_type", "content"]
    scene = good(
        rows_of(lookalikes, "vript", "vript", parts=parts, path="v/{clip_id}.mkv", question="What?")
    )[0]
    assert scene.media == ("v/vid0-Scene-001.mkv",)
    assert texts(scene) == ["<image>\nWhat?", "Shot type: Close-up\nBar 1 moves."]
    assert len(rows_of(lookalikes, "moviechat", "moviechat", parts=["caption"])) == 2
    tar = good(rows_of(lookalikes, "capsfusion", "capsfusion", images="tar", caption="caption"))[0]
    assert tar.media == ("00000.tar::000000000.jpg",) and texts(tar)[1] == "alt text"
    seconds = good(rows_of(lookalikes, "internvid", "internvid.jsonl", fields={"end": "absent"}))[0]
    assert seconds.bounds == (0.5, math.inf)
    numbers = good(rows_of(lookalikes, "internvid", "internvid.jsonl", path="{video}-{start}.mp4"))[1]
    assert numbers.media == ("dQw-invented-1.mp4",)


@pytest.mark.parametrize(
    ("kind", "path", "options", "words"),
    [
        ("vript", "vript", {"parts": ["voice"]}, "options: parts is"),
        ("vript", "vript", {"path": 3}, "options: path is 3"),
        ("vript", "vript", {"path": "{clip}.mp4"}, "unknown name {clip}; known: {video_id}, {clip_id}"),
        ("moviechat", "moviechat", {"parts": "caption"}, "options: parts is 'caption'"),
        ("moviechat", "media/odd/clip", {}, "holds no .json or .jsonl file"),
        ("internvid", "internvid.jsonl", {"clips": "half"}, "write one of whole, cut"),
        ("internvid", "internvid.jsonl", {"fields": {"name": "id"}}, "unknown key 'name'"),
        ("internvid", "internvid.jsonl", {"fields": {"video": 3}}, "must map names"),
        ("capsfusion", "capsfusion", {"caption": "laion_coco"}, "has no column 'laion_coco'"),
        ("capsfusion", "llava.json", {}, "cannot be read as Parquet"),
        ("capsfusion", "gone.parquet", {}, "cannot be read as Parquet"),
        ("llava_parquet", "gone.parquet", {}, "cannot be read as Parquet"),
    ],
)
def test_wrong_options_and_files_are_named(
    lookalikes: Path, kind: str, path: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(lookalikes, kind, path, **options)
    assert words in str(caught.value) and str(caught.value).startswith(str(lookalikes / path))


@pytest.mark.parametrize(
    ("kind", "columns"), [("llava_parquet", ["conversations"]), ("capsfusion", ["key", "status", "caption"])]
)
def test_parquet_files_with_text_that_is_not_utf8_are_named(
    tmp_path: Path, kind: str, columns: list[str]
) -> None:
    text = pyarrow.array([b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table(dict.fromkeys(columns, text)), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as Parquet \(.*utf-8"):
        rows_of(tmp_path, kind, "a.parquet")


def test_media_in_parquet_files(lookalikes: Path, tmp_path: Path) -> None:
    files = lookalikes / "onevision"
    picture, clip = ((lookalikes / "media" / name).read_bytes() for name in ("a.jpg", "one.mp4"))
    for name, content in (
        ("train-00000.parquet::0/image", picture), ("train-00000.parquet::2/image", picture),
        ("train-00001.parquet::0/images/1", picture + bytes(9)), ("train-00002.parquet::0/video", clip),
    ):  # fmt: skip
        medium = open_media(str(files), name)
        assert medium.data == content and str(medium).startswith(f"{files}/{name}")
    options = MediaOptions(stream=0)
    assert probe(open_media(str(files), "train-00002.parquet::0/video", options)).num_frames == 20
    for member in ("1/image", "3/image", "0/picture", "0/image/0", "0", "x/image"):
        with pytest.raises(DataError) as caught:
            open_media(str(files), f"train-00000.parquet::{member}")
        assert caught.value.fault.reason == "missing" and f"::{member}: " in str(caught.value)
    damaged = tmp_path / "a.parquet"
    content = (files / "train-00000.parquet").read_bytes()
    damaged.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(DataError) as caught:
        open_media(str(tmp_path), "a.parquet::0/image")
    assert caught.value.fault.reason == "corrupt"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": ["a.jpg"], "text": ["b"]}, r"its columns \('image', 'text'\) do not tell its format; set"),
        ({"conversations": [[]], "image": ["a.jpg"]}, "column 'image' holds no bytes of files; write the"),
        ({"image_url": ["a"], "capsfusion": ["b"]}, "has no column 'key'; download its images with img2data"),
    ],
)
def test_parquet_files_of_other_kinds_say_what_to_do(
    tmp_path: Path, columns: dict[str, list[Any]], words: str
) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=words):
        [spec] = read_mixture(str(tmp_path / "a.parquet"))
        list(read_rows(spec, seed=0))


def test_halves_of_characters_are_faults(tmp_path: Path) -> None:
    """JSON and tars can hold text that Parquet and records cannot."""
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A."}]
    rows = [
        {"image": "a.jpg", "conversations": [turns[0], {"from": "gpt", "value": "\ud83d"}]},
        {"image": "\udcff.jpg", "conversations": turns},
        {"image": "a.jpg", "video_read_type": "\ud83d", "conversations": turns},
        {"id": "\ud83d", "image": "a.jpg"},
        {"id": "\ud83d", "image": "a.jpg", "conversations": turns},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as tar:
        for name in ("é.jpg", "é.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    found = []
    for kind, file in (("llava", "a.jsonl"), ("webdataset", "a.tar")):
        found += read_rows(DatasetSpec("x", str(tmp_path / file), kind, str(tmp_path)), seed=0)
    reasons = [row.reason if isinstance(row, Fault) else "" for row in found]
    assert reasons == ["conversation", "malformed", "malformed", "conversation", "", "malformed"]
    for row in found:
        for text in (row.where, row.line() if isinstance(row, Fault) else ""):
            text.encode()


@pytest.mark.parametrize(
    "kind", sorted(FORMATS.keys() - {"capsfusion", "llava_parquet", "tfds", "webdataset"})
)  # not JSON
@pytest.mark.parametrize(
    "value",
    [None, 3, "x", [], {}, {"video": 3}, {"QA": [3], "video": "a"}, {"info": {}, "global": [3]},
     {"info": {"video_path": 3}, "breakpoint": [{"question": "q", "answer": "a", "time": 1}]},
     {"info": 3}, {"data": {"s": 3}}, {"data": {"s": {"caption": {"content": "c"}}}},
     {"YoutubeID": ["a"], "Caption": "c"}, {"conversations": {}}],
)  # fmt: skip
def test_malformed_rows_are_faults_never_errors(tmp_path: Path, kind: str, value: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(value))
    spec = DatasetSpec("x", str(tmp_path / "a.jsonl"), kind, str(tmp_path))
    assert [type(row) for row in read_rows(spec, seed=0)] == [Fault]


def test_a_format_that_no_one_reads_yet_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("a.npz", "b"):
        (tmp_path / name).touch()
        with pytest.raises(
            UserError, match="set format to one of llava, llava_parquet, videochat2, moviechat"
        ):
            read_mixture(str(tmp_path / name))


def test_moments_beyond_all_numbers(tmp_path: Path) -> None:
    for number, (frame, fps) in enumerate([(10**400, 25), (5, 10**400), (5, 25)]):
        pair = {"question": "A?", "answer": "B.", "time": frame}
        content = {"info": {"video_path": "v.mp4", "fps": fps}, "breakpoint": [pair]}
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    *bad, row = read_rows(DatasetSpec("set", str(tmp_path), "moviechat", str(tmp_path)), seed=0)
    assert [getattr(entry, "reason", None) for entry in bad] == ["clip_times"] * 2
    assert isinstance(row, Row) and row.bounds == (0.0, 0.24)
