"""Rows of LLaVA files: both forms of turns, both placeholders, and a message for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
from video_files import write_video

from crosslmm_jax.data.annotations.mixture import read_rows
from crosslmm_jax.data.annotations.rows import DatasetSpec, Row
from crosslmm_jax.data.media import open_media, probe
from crosslmm_jax.errors import Fault, UserError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return str(path)


def read(file: str, root: Path) -> list[Row | Fault]:
    return list(read_rows(DatasetSpec("set", file, "llava", str(root)), seed=0))


def fault(file: str, root: Path) -> Fault:
    """The fault of the last row, which is the only bad one."""
    *good, entry = read(file, root)
    assert all(isinstance(row, Row) for row in good) and isinstance(entry, Fault)
    return entry


def test_json_and_jsonl(tmp_path: Path) -> None:
    two = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "b"}]
    rows = [
        {"id": 7, "video": "x/a.mp4", "conversations": TURNS, "start": 1, "end": 2.5},
        {"image": ["a.png", "b.png"], "conversations": two},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
    ]
    for name in ("a.json", "b.jsonl", "lines.json"):
        file = write(tmp_path / name, rows)
        if name == "lines.json":
            Path(file).write_bytes(b"\xef\xbb\xbf" + (tmp_path / "b.jsonl").read_bytes())
        found = [row for row in read(file, tmp_path) if isinstance(row, Row)]
        assert [row.row for row in found] == [0, 1, 2] and {row.root for row in found} == {str(tmp_path)}
        assert [row.media for row in found] == [("x/a.mp4",), ("a.png", "b.png"), ()]
        assert [row.modality for row in found] == ["video", "multi_image", "text"]
        assert found[0].bounds == (1.0, 2.5) and found[1].bounds is None
        assert found[0].where == f"{file}: row 0 (id 7)" and found[1].where == f"{file}: row 1"


@pytest.mark.parametrize("name", [
    "../a.mp4", "/etc/a.mp4", "x/../../a.mp4", "..", "C:\\a.mp4", "c:/a.mp4", "http://a.org/b.mp4", "s3://a/b.mp4",
])  # fmt: skip
def test_media_stay_inside_the_root(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "a.json", [{"image": [name], "conversations": TURNS}])
    entry = fault(file, tmp_path)
    assert entry.reason == "outside_root" and entry.where.endswith("row 0")
    fix = "is an address; download the file" if "://" in name else "is not below data_root; write it relative"
    assert fix in entry.detail


@pytest.mark.parametrize("name", ["A: movie.mp4", "a:b.mp4", "Part 1:/a.mp4", "x/C:/a.mp4", "10:30.mp4"])
def test_a_colon_in_a_name_is_no_drive(tmp_path: Path, name: str) -> None:
    """Read to its frames, since readers know protocols too."""
    video = tmp_path / name
    video.parent.mkdir(parents=True, exist_ok=True)
    write_video(tmp_path / "plain.mp4", 5).rename(video)
    file = write(tmp_path / "a.json", [{"video": name, "conversations": TURNS}])
    [row] = read(file, tmp_path)
    assert isinstance(row, Row) and row.media == (name,)
    assert probe(open_media(row.root, row.media[0])).num_frames == 5


@pytest.mark.parametrize("before", [[], ["system"], ["system", "system"]])
@pytest.mark.parametrize("greeting", [0, 1])
def test_a_greeting_is_left_out(tmp_path: Path, before: list[str], greeting: int) -> None:
    """The assistant's first words answer nothing, whether or not a system turn comes before them."""
    turns = [{"from": role, "value": "Be brief."} for role in before]
    hello = [{"from": "gpt", "value": "Hello! How can I help?"}] * greeting
    [row] = read(
        write(tmp_path / "a.json", [{"video": "a.mp4", "conversations": [*turns, *hello, *TURNS]}]), tmp_path
    )
    assert isinstance(row, Row)
    assert [turn.role for turn in row.turns] == [*before, "user", "assistant"]
    assert row.turns[-1].text == "That."


def test_the_system_prompt_of_a_row(tmp_path: Path) -> None:
    """ShareGPT's rows, as LLaMA-Factory reads them, hold it in a field; it becomes the first turn."""
    talk = {"video": "a.mp4", "conversations": TURNS}
    own = {"from": "system", "value": "Be brief."}
    systems = ["Be brief.", "", None, 3]
    rows = [talk | {"system": system} for system in systems]
    rows.append({"video": "a.mp4", "conversations": [own, *TURNS], "system": "Be long."})
    first, *without, number, both = read(write(tmp_path / "a.json", rows), tmp_path)
    assert isinstance(first, Row)
    assert [(turn.role, turn.text) for turn in first.turns[:2]] == [
        ("system", "Be brief."), ("user", TURNS[0]["value"])
    ]  # fmt: skip
    assert all(isinstance(row, Row) and row.turns[0].role == "user" for row in without)
    for row, said in ((number, "system must be a text"), (both, "holds both system and a system turn")):
        assert isinstance(row, Fault) and said in str(row)


@pytest.mark.parametrize("videos", ["videos", "video"])
def test_plural_names_of_fields(tmp_path: Path, videos: str) -> None:
    """As LLaMA-Factory and others write them."""
    rows = [
        {
            videos: ["a.mp4", "b.mp4"],
            "conversations": [TURNS[0] | {"value": "<video><video>\nWhat?"}, TURNS[1]],
        },
        {"images": "a.jpg", "messages": TURNS},
        {"images": [], "video": "a.mp4", "conversations": TURNS},
        {"image": "a.jpg", "images": ["b.jpg"], "conversations": TURNS},
    ]
    found = read(write(tmp_path / "a.json", rows), tmp_path)
    assert [row.media for row in found if isinstance(row, Row)] == [
        ("a.mp4", "b.mp4"),
        ("a.jpg",),
        ("a.mp4",),
    ]
    assert isinstance(found[3], Fault) and "holds both image and images; keep one" in found[3].detail


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("text", "must be an object"),
        ({"video": "a.mp4"}, "conversations is missing"),
        ({"video": "a.mp4", "conversations": []}, "no human turn"),
        ({"video": "a.mp4", "conversations": TURNS[:1]}, "conversations holds no answer"),
        ({"video": "a.mp4", "conversations": [TURNS[1], TURNS[0]]}, "conversations holds no answer"),
        (
            {"video": "a.mp4", "conversations": [*TURNS, TURNS[1] | {"value": " \n"}]},
            "an answer without words",
        ),
        ({"video": 3, "conversations": TURNS}, "video must be a path"),
        ({"image": ["a.png", "b.png"], "conversations": TURNS}, "1 <image>/<video> placeholders for 2 media"),
        ({"conversations": TURNS}, "1 <image>/<video> placeholders for 0 media"),
        (
            {"video": "a.mp4", "conversations": TURNS, "start": 3, "end": 2},
            "are no times with 0 <= start < end",
        ),
        ({"video": "a.mp4", "conversations": TURNS, "start": 10**400}, "are no times with 0 <= start < end"),
        ({"video": "a.mp4", "conversations": TURNS, "start": "x"}, "are no times with 0 <= start < end"),
        ({"image": [""], "conversations": TURNS}, "must be a text that is not empty"),
        ({"image": ["a\0b"], "conversations": TURNS}, "must be a text that is not empty"),
    ],
)
def test_mistakes_name_file_and_row(tmp_path: Path, row: Any, words: str) -> None:
    good = {"video": "a.mp4", "conversations": TURNS}
    file = write(tmp_path / "a.json", [good, row])
    entry = fault(file, tmp_path)
    assert entry.where.startswith(f"{file}: row 1") and words in entry.detail and "\n" not in entry.detail


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    good = json.dumps({"video": "a.mp4", "conversations": TURNS})
    for name, text in (("a.json", f"[{good}]"), ("a.jsonl", good)):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert [row.media for row in read(str(tmp_path / name), tmp_path)] == [("a.mp4",)]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.json: cannot be read"):
        read(str(tmp_path / "none.json"), tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{oops\n" * 2)
    with pytest.raises(UserError, match="broken.jsonl: line 1 is no valid JSON"):
        read(str(broken), tmp_path)
    good = {"video": "a.mp4", "conversations": TURNS}
    broken.write_text(json.dumps(good) + "\n{oops\n")
    entry = fault(str(broken), tmp_path)
    assert entry.where.endswith("broken.jsonl: row 1") and "line 2 is no valid JSON" in entry.detail
    (tmp_path / "object.json").write_text("{\n}")
    with pytest.raises(UserError, match="object.json: must hold a list of rows"):
        read(str(tmp_path / "object.json"), tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.json: cannot be read"):
        read(str(tmp_path / "binary.json"), tmp_path)
    with pytest.raises(UserError, match="holds no rows"):
        read(write(tmp_path / "zero.json", []), tmp_path)
