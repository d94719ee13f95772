"""Data sets of TensorFlow Datasets as ArrayRecord: feature names, damaged files, the cost of one record."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lookalikes import write_image, write_records, write_tfds, write_video
from tensorflow_datasets import features
from video_files import assert_same

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.annotations.mixture import read_mixture, read_rows
from crosslmm_jax.data.annotations.rows import DatasetSpec, Row
from crosslmm_jax.data.media.archives import array_record as records
from crosslmm_jax.data.media.archives.array_record import read_record
from crosslmm_jax.data.media.locate import open_media
from crosslmm_jax.data.media.video import probe, read_frames
from crosslmm_jax.errors import Fault, UserError

FOUR = SamplingConfig(frames=4)
TEXT, SEVERAL = features.Text(), features.Sequence(features.Text())
FILE = "invented-train.array_record-00000"


def rows_of(folder: Path, **options: Any) -> list[Row | Fault]:
    spec = DatasetSpec("x", str(folder), "tfds", str(folder), options=options)
    return list(read_rows(spec, seed=0))


def one_row(folder: Path, **options: Any) -> Row:
    (row,) = rows_of(folder, **options)
    assert isinstance(row, Row), row
    return row


def talk(row: Row) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in row.turns]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("pictures") / "p" / f"{number}.jpg" for number in range(3)]
    paths = [paths[0].with_name(path.name) for path in paths]
    for number, path in enumerate(paths):
        write_image(path, 5 * number)
    return paths


def test_it_reads_without_tensorflow(lookalikes: Path) -> None:
    program = (
        "import sys\n"
        "from crosslmm_jax.data.annotations.mixture import read_mixture, read_rows\n"
        f"(spec,) = read_mixture({str(lookalikes / 'pictures')!r})\n"
        "print(spec.name, len(list(read_rows(spec, seed=0))), 'tensorflow' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.stdout, found.returncode) == ("pictures 3 False\n", 0), found.stderr


def test_a_folder_is_known_by_what_lies_in_it(lookalikes: Path) -> None:
    (spec,) = read_mixture(str(lookalikes / "clips" / "1.0.0"))
    assert (spec.name, spec.format, spec.root) == ("clips", "tfds", spec.path)


def test_members_of_records_read_as_files_do(tmp_path: Path, video: Path, pictures: list[Path]) -> None:
    example = {
        "clip": video.read_bytes(), "stills": [str(path) for path in pictures], "caption": "A bar.",
        "meta": {"from": 0.5},
    }  # fmt: skip
    kinds = {
        "clip": features.Tensor(shape=(), dtype=np.object_), "caption": TEXT,
        "stills": features.Sequence(features.Image(encoding_format="jpeg")), "meta": {"from": np.float32},
    }  # fmt: skip
    write_tfds(tmp_path / "set", kinds, [example])
    row = one_row(tmp_path / "set", fields={"videos": "clip", "start": "meta/from"})
    assert (row.modality, row.media, row.bounds) == ("video", (f"{FILE}::0/clip/0.mp4",), (0.5, np.inf))
    medium = open_media(row.root, row.media[0])
    assert str(medium) == f"{tmp_path}/set/{row.media[0]}" and probe(medium) == probe(video)
    assert_same(read_frames(medium, FOUR, size=24), read_frames(video, FOUR, size=24))


def test_several_images_are_one_row(tmp_path: Path, pictures: list[Path]) -> None:
    kinds = {"images": features.Sequence(features.Image(encoding_format="jpeg")), "caption": TEXT}
    write_tfds(tmp_path / "set", kinds, [{"images": [str(path) for path in pictures], "caption": "Bars."}])
    row = one_row(tmp_path / "set", question="What do they show?")
    assert row.modality == "multi_image"
    assert row.media == tuple(f"{FILE}::0/images/{number}.jpg" for number in range(3))
    assert talk(row) == [("user", "<image><image><image>\nWhat do they show?"), ("assistant", "Bars.")]
    for name, path in zip(row.media, pictures, strict=True):
        assert_same(read_frames(open_media(row.root, name), FOUR, size=24), read_frames(path, FOUR, size=24))


def test_pictures_under_videos_are_its_frames(tmp_path: Path, pictures: list[Path]) -> None:
    """The layout of tfds.features.Video, which only tensorflow can write: the test writes its description."""
    kinds = {"frames": features.Sequence(features.Image(encoding_format="jpeg")), "caption": TEXT}
    write_tfds(tmp_path / "set", kinds, [{"frames": [str(path) for path in pictures], "caption": "Bars."}])
    described = tmp_path / "set" / "features.json"
    for kind in ("sequence", "video"):
        content = json.loads(described.read_text())
        if kind == "video":
            name = "tensorflow_datasets.core.features.video_feature.Video"
            content["featuresDict"]["features"]["frames"] = {"pythonClassName": name, "video": {}}
            described.write_text(json.dumps(content))
        row = one_row(tmp_path / "set", fields={"videos": "frames"})
        assert (row.modality, row.media) == ("video", (f"{FILE}::0/frames/0-2.jpg",))
        medium = open_media(row.root, row.media[0])
        folder = pictures[0].parent
        assert probe(medium) == probe(folder)
        for sampling, bounds in ((FOUR, None), (FOUR, (1.0, 2.5))):
            assert_same(
                read_frames(medium, sampling, size=24, bounds=bounds),
                read_frames(folder, sampling, size=24, bounds=bounds),
            )


@pytest.mark.parametrize(
    ("kinds", "example", "options", "expected"),
    [
        ({"question": TEXT, "answer": TEXT}, {"question": "Why?", "answer": " So. "}, {},
         [("user", "Why?"), ("assistant", "So.")]),
        ({"conversations": TEXT},
         {"conversations": '[{"from": "human", "value": "é?"}, {"from": "gpt", "value": "A"}]'}, {},
         [("user", "é?"), ("assistant", "A")]),
        ({"c": features.Sequence({"role": TEXT, "content": TEXT})},
         {"c": [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]},
         {"fields": {"conversations": "c"}}, [("system", "s"), ("user", "u"), ("assistant", "a")]),
        ({"a": {"b": features.Sequence({"from": TEXT, "value": TEXT})}},
         {"a": {"b": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}},
         {"fields": {"conversations": "a/b"}}, [("user", "U"), ("assistant", "A")]),
    ],
)  # fmt: skip
def test_conversations_of_any_form(
    tmp_path: Path, kinds: dict[str, Any], example: Any, options: Any, expected: list[tuple[str, str]]
) -> None:
    write_tfds(tmp_path / "set", kinds, [example])
    row = one_row(tmp_path / "set", **options)
    assert (talk(row), row.modality) == (expected, "text")


def test_paths_lead_to_the_root(tmp_path: Path, video: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.mp4").write_bytes(video.read_bytes())
    names = ["a.mp4", "a.mp4", "../a.mp4", ""]
    starts = [1, 30, 0, 0]
    examples = [
        {"video": name, "caption": "A bar.", "start": start, "video_read_type": "av", "end": "0:02"}
        for name, start in zip(names, starts, strict=True)
    ]
    kinds = {"video": TEXT, "caption": TEXT, "start": np.int64, "video_read_type": TEXT, "end": TEXT}
    write_tfds(tmp_path / "set", kinds, examples)
    (tmp_path / "m.yaml").write_text("datasets: [{path: set, data_root: media}]")
    (spec,) = read_mixture(str(tmp_path / "m.yaml"))
    good, *bad = read_rows(spec, seed=0)
    assert isinstance(good, Row) and good.root == str(tmp_path / "media")
    assert (good.media, good.bounds) == (("a.mp4",), (1.0, 2.0))
    assert [entry.reason for entry in bad if isinstance(entry, Fault)] == [
        "clip_times", "outside_root", "conversation",
    ]  # fmt: skip


def test_splits_and_strategies_read_only_what_they_select(
    lookalikes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(
        "crosslmm_jax.data.annotations.formats.tfds.read_record",
        lambda path, number: read.append(number) or read_record(path, number),
    )
    folder = lookalikes / "pictures"
    assert [row.where[-8:] for row in rows_of(folder, split="train[2:]")] == ["record 0"]
    assert len(rows_of(folder, split="train[:1]+train[2:]")) == 2 and len(read) == 3
    spec = DatasetSpec("x", str(folder), "tfds", str(folder), strategy="end:40%")
    assert len(list(read_rows(spec, seed=0))) == 2 and len(read) == 5


def test_wrong_data_sets_and_options_are_named(lookalikes: Path, tmp_path: Path) -> None:
    folder = lookalikes / "pictures"
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (folder, {"split": "test"}, "options: split is 'test'; the data set has train"),
        (folder, {"split": "train[x"}, "options: split is 'train[x'"),
        (folder, {"fields": {"images": "picture"}}, "images is 'picture'; the features are caption, image"),
        (folder, {"fields": {"image": "image"}}, "unknown key 'image'"),
        (lookalikes / "clips", {}, f"name {lookalikes}/clips/1.0.0"),
        (lookalikes / "clips" / "1.0.0", {}, "name conversations or answer under options: fields"),
        (lookalikes / "media", {}, "holds no dataset_info.json; name a folder that has one"),
    ]
    for number, (name, content, words) in enumerate([
        ("dataset_info.json", "{", "dataset_info.json: cannot be read"),
        ("dataset_info.json", '{"fileFormat": "tfrecord"}', "is kept as tfrecord, which needs tensorflow"),
        ("features.json", '{"featuresDict": 3}', "is no description of features"),
        ("features.json", "[]", "is no description of features"),
    ]):  # fmt: skip
        copy = tmp_path / str(number)
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        (copy / name).write_text(content)
        cases.append((copy, {}, words))
    for path, options, words in cases:
        with pytest.raises(UserError) as caught:
            rows_of(path, **options)
        assert words in str(caught.value) and str(caught.value).startswith(str(path))


def test_files_of_records_stay_in_the_folder(lookalikes: Path, tmp_path: Path) -> None:
    """Neither dataset_info.json nor a link may lead to records outside the folder."""
    source = lookalikes / "pictures"
    for name in ("named", "linked"):
        (tmp_path / name).mkdir()
        for file in ("features.json", "dataset_info.json"):
            (tmp_path / name / file).write_text((source / file).read_text())
    info = json.loads((source / "dataset_info.json").read_text())
    template = info["splits"][0]["filepathTemplate"]
    info["splits"][0]["filepathTemplate"] = os.path.relpath(source, tmp_path / "named") + "/" + template
    (tmp_path / "named" / "dataset_info.json").write_text(json.dumps(info))
    for file in source.glob("*array_record*"):
        (tmp_path / "linked" / file.name).symlink_to(file)
    for name in ("named", "linked"):
        folder = tmp_path / name
        bad = [row.reason for row in rows_of(folder) if isinstance(row, Fault)]
        assert bad == ["outside_root"] * 3
        spec = DatasetSpec("x", str(folder), "tfds", str(folder))
        rows = [row for row in read_rows(spec, seed=0, allow_outside=True) if isinstance(row, Row)]
        assert len(rows) == 2
        assert open_media(rows[0].root, rows[0].media[0], allow_outside=True).data


def test_records_beside_another_format_are_read(lookalikes: Path, tmp_path: Path) -> None:
    """The files that tfds.convert_format writes."""
    shutil.copytree(lookalikes / "pictures", tmp_path / "set")
    path = tmp_path / "set" / "dataset_info.json"
    formats = {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | formats))
    assert len([row for row in rows_of(tmp_path / "set") if isinstance(row, Row)]) == 2


def test_values_that_are_no_media_are_faults(tmp_path: Path) -> None:
    write_tfds(tmp_path / "set", {"video": np.int64, "caption": TEXT}, [{"video": 3, "caption": "A"}])
    (bad,) = rows_of(tmp_path / "set")
    assert isinstance(bad, Fault) and bad.reason == "malformed" and "holds numbers" in bad.detail


def test_a_damaged_record_spoils_its_row_alone(lookalikes: Path, tmp_path: Path) -> None:
    for file in (lookalikes / "pictures").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_records(tmp_path / FILE, [read_record(str(tmp_path / FILE), number) for number in range(2)])
    content = bytearray((tmp_path / FILE).read_bytes())
    content[content.index(b"An orange bar.")] ^= 1
    (tmp_path / FILE).write_bytes(content)
    first, second, third = rows_of(tmp_path)
    assert isinstance(first, Fault) and first.reason == "corrupt" and isinstance(third, Row)
    assert isinstance(second, Fault) and second.reason == "conversation"
    (tmp_path / FILE).unlink()
    assert [row.reason for row in rows_of(tmp_path)[:2] if isinstance(row, Fault)] == ["missing"] * 2


def test_a_record_of_several_media_is_read_once_for_all(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"images": features.Sequence(features.Image(encoding_format="jpeg")), "caption": TEXT}
    example = {"images": [str(path) for path in pictures], "caption": "Bars."}
    write_tfds(tmp_path / "set", kinds, [example, example])
    first, second = rows_of(tmp_path / "set", question="What?")
    assert isinstance(first, Row) and isinstance(second, Row)
    parsed: list[str] = []
    parse = records.parse_example
    monkeypatch.setattr(
        records, "parse_example", lambda record, where: parsed.append(where) or parse(record, where)
    )
    for row in (first, second, first):
        for name, path in zip(row.media, pictures, strict=True):
            assert open_media(row.root, name).data == path.read_bytes()
    assert len(parsed) == 3 and records._LAST.record is None
