"""Rows of LLaVA files: both forms, both placeholders, and every mistake named."""

import json
from pathlib import Path
from typing import Any

import pytest

from crosslmm_jax.data.annotations import read_annotations
from crosslmm_jax.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


def test_json_and_jsonl(tmp_path: Path) -> None:
    two = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "b"}]
    rows = [
        {"id": 7, "video": "x/a.mp4", "conversations": TURNS, "start": 1, "end": 2.5},
        {"image": ["a.png", "b.png"], "conversations": two},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    ]
    files = [write(tmp_path / "a.json", rows), write(tmp_path / "b.jsonl", rows)]
    read = read_annotations(files, str(tmp_path))
    assert [row.index for row in read] == list(range(6))
    root = str(tmp_path)
    assert read[0].media == read[3].media == (f"{root}/x/a.mp4",)
    assert read[1].media == (f"{root}/a.png", f"{root}/b.png")
    assert read[2].media == () and read[0].bounds == (1.0, 2.5) and read[1].bounds is None
    assert read[0].where == f"{files[0]}: row 0 (id 7)"
    assert read[4].where == f"{files[1]}: row 1"


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/a.mp4", "x/../../a.mp4", "..", "", "C:\\a.mp4", "a\0b"])
def test_media_stay_inside_the_root(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "a.json", [{"image": [name], "conversations": TURNS}])
    with pytest.raises(UserError, match="row 0: media path .* must be relative to media_root"):
        read_annotations([file], str(tmp_path))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("text", "must be an object"),
        ({"video": "a.mp4"}, "conversations is missing"),
        ({"video": "a.mp4", "conversations": []}, "no human turn"),
        ({"video": 3, "conversations": TURNS}, "video must be a path"),
        ({"image": ["a.png", "b.png"], "conversations": TURNS}, "1 <image>/<video> placeholders for 2 media"),
        ({"conversations": TURNS}, "1 <image>/<video> placeholders for 0 media"),
        ({"video": "a.mp4", "conversations": TURNS, "start": 3, "end": 2}, "start and end must be seconds"),
        ({"video": "a.mp4", "conversations": TURNS, "start": "x"}, "start and end must be seconds"),
    ],
)
def test_mistakes_name_file_and_row(tmp_path: Path, row: Any, words: str) -> None:
    good = {"video": "a.mp4", "conversations": TURNS}
    file = write(tmp_path / "a.json", [good, row])
    with pytest.raises(UserError) as caught:
        read_annotations([file], str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"{file}: row 1") and words in message and "\n" not in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    root = str(tmp_path)
    with pytest.raises(UserError, match="none.json: cannot be read"):
        read_annotations([str(tmp_path / "none.json")], root)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"conversations": TURNS}) + "\n{oops\n")
    with pytest.raises(UserError, match="broken.jsonl: line 2 is no valid JSON"):
        read_annotations([str(broken)], root)
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(UserError, match="object.json: must hold a list of rows"):
        read_annotations([str(tmp_path / "object.json")], root)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.json: cannot be read"):
        read_annotations([str(tmp_path / "binary.json")], root)
    with pytest.raises(UserError, match="holds no rows"):
        read_annotations([write(tmp_path / "zero.json", [])], root)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_annotations([write(tmp_path / "zero.json", [])], str(tmp_path / "nowhere"))
