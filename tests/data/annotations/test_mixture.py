"""Mixtures: YAML files, sampling strategies, and bad rows reported apart from good ones."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax.data.annotations.json_files import expand_files
from crosslmm_jax.data.annotations.mixture import read_mixture, read_rows
from crosslmm_jax.data.annotations.rows import DatasetSpec, Origin, Row, parse_seconds
from crosslmm_jax.data.annotations.strategies import parse_strategy, select
from crosslmm_jax.errors import DataError, Fault, UserError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


def write_rows(path: Path, count: int) -> str:
    rows = [{"id": number, "video": f"{number}.mp4", "conversations": TURNS} for number in range(count)]
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows))
    return str(path)


def selected(count: int, text: str, seed: str = "s") -> list[int]:
    selection = select(parse_strategy(text, where="x"), lambda: count, seed=seed)
    return [row for row in range(count) if row in selection and not selection.ends_before(row)]


@settings(deadline=None)
@given(count=st.integers(0, 60), number=st.integers(0, 70), percent=st.booleans())
def test_strategies_are_slices_of_the_list(count: int, number: int, percent: bool) -> None:
    text = f"{number}%" if percent else str(number)
    n = math.ceil(number * count / 100) if percent else number
    rows = list(range(count))
    assert selected(count, "all") == rows
    assert selected(count, f"first:{text}") == rows[:n]
    assert selected(count, f"first2:{text}") == rows[n : 2 * n]
    assert selected(count, f"first3:{text}") == rows[2 * n : 3 * n]
    assert selected(count, f"first4:{text}") == rows[3 * n : 4 * n]
    assert selected(count, f"end:{text}") == (rows[-n:] if n else [])
    drawn = selected(count, f"random:{text}")
    assert len(drawn) == min(n, count) and drawn == selected(count, f"random:{text}")


def test_rows_are_counted_once() -> None:
    """A large file takes minutes to read."""
    for text in ("first:1", "first2:10%", "end:1", "end:10%", "random:10%"):
        counted = []
        select(parse_strategy(text, where="x"), lambda counted=counted: counted.append(1) or 50, seed="s")
        assert len(counted) == (text != "first:1"), text


def test_the_random_draw_depends_on_the_seed_alone_and_is_fair() -> None:
    # Constants: another Python or machine that draws other rows fails here.
    assert selected(10, "random:4", "0/a") == [0, 2, 4, 9]
    counts = [0] * 10
    for seed in range(2000):
        for row in selected(10, "random:3", str(seed)):
            counts[row] += 1
    assert all(500 < count < 700 for count in counts)  # 600 expected, standard deviation 20


@pytest.mark.parametrize(
    "text", ["random", "first:", "first:-1", "last:3", "first5:2", "first:3.5%", "end:101%"]
)
def test_unknown_strategies_are_named(text: str) -> None:
    with pytest.raises(UserError, match="^here: sampling_strategy is"):
        parse_strategy(text, where="here")


@given(
    hours=st.integers(0, 99),
    minutes=st.integers(0, 59),
    millis=st.integers(0, 59_999),
    seconds=st.floats(0, 1e6),
)
def test_times(hours: int, minutes: int, millis: int, seconds: float) -> None:
    expected = hours * 3600 + minutes * 60 + millis / 1000
    text = f"{hours:02d}:{minutes:02d}:{millis // 1000:02d}.{millis % 1000:03d}"
    assert parse_seconds(text) == pytest.approx(expected, abs=1e-9)
    assert parse_seconds(seconds) == parse_seconds(repr(seconds)) == seconds


HUGE = [
    pytest.param(value, id=name)
    for name, value in {"int": 10**400, "minutes": f"{'9' * 400}:00", "hours": f"{'9' * 400}:59:59"}.items()
]


def test_a_name_that_another_has_already(tmp_path: Path) -> None:
    for folder in "xyz":
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "a.json", 1)
    write_rows(tmp_path / "b.json", 1)
    (tmp_path / "m.yaml").write_text(
        "datasets: [{path: x/a.json}, {path: y/a.json}, {path: b.json, name: 'a#2'}, {path: z/a.json}]"
    )
    assert [spec.name for spec in read_mixture(str(tmp_path / "m.yaml"))] == ["a", "a#3", "a#2", "a#4"]


@pytest.mark.parametrize(
    "value", ["", "x", "1:60", "0:60:00", -1, float("nan"), "inf", True, None, [1], *HUGE]
)
def test_no_times(value: Any) -> None:
    with pytest.raises(ValueError):
        parse_seconds(value)


def test_patterns_of_files(tmp_path: Path) -> None:
    assert expand_files("/d/{a,b(c,d)}.json") == ["/d/a.json", "/d/b(c.json", "/d/d).json"]
    assert expand_files("s{08..10}.tar") == ["s08.tar", "s09.tar", "s10.tar"]
    assert expand_files("a{b}c") == ["a{b}c"]
    assert expand_files("2..1/s{1..1}.tar") == ["2..1/s1.tar"]
    with pytest.raises(
        UserError, match=r"s\{05\.\.1\}\.json: the range .* counts down .*; write \{1\.\.05\}"
    ):
        expand_files("s{05..1}.json")
    for name in ("2.tar", "1.tar"):
        (tmp_path / name).touch()
    assert expand_files(f"{tmp_path}/*.tar") == [f"{tmp_path}/1.tar", f"{tmp_path}/2.tar"]
    assert expand_files(f"{tmp_path}/*.zip") == [f"{tmp_path}/*.zip"]


def test_yaml_with_every_key(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for name in ("a.json", "b.jsonl", "c.json"):
        write_rows(tmp_path / name, 10)
    (tmp_path / "m.yaml").write_text(
        "datasets:\n"
        '  - {json_path: "{a,c}.json", sampling_strategy: "first:20%", data_root: media, media_type: video}\n'
        "  - {json_path: b.jsonl, sampling_strategy: 'end:3', video_read_type: gif, weight: 2, name: a}\n"
        "  - {json_path: gone.json, skip_missing: true}\n"
    )
    specs = read_mixture(str(tmp_path / "m.yaml"))
    assert [spec.name for spec in specs] == ["a", "c", "a#2"]
    assert [spec.root for spec in specs] == [f"{tmp_path}/media"] * 2 + [str(tmp_path)]
    assert specs[2].weight == 2.0 and specs[0].media_type == "video"
    read = [row for spec in specs for row in read_rows(spec, seed=0)]
    rows = [row for row in read if isinstance(row, Row)]
    assert len(rows) == len(read)
    assert [row.row for row in rows] == [0, 1, 0, 1, 7, 8, 9]
    assert rows[-1].media == ("9.mp4",) and rows[-1].modality == "video"
    assert rows[-1].where == f"{tmp_path}/b.jsonl: row 9 (id 9)"


def test_folders_of_frames_have_a_rate(tmp_path: Path) -> None:
    """That of the row, else that of the data set; the frames of TVQA have a rate of their own."""
    (tmp_path / "frames").mkdir()
    for name in ("a.json", "vqa_tvqa-tvqa_123k.jsonl"):
        write_rows(tmp_path / name, 1)
    rows = [{"video": "x", "conversations": TURNS}, {"video": "y", "conversations": TURNS, "folder_fps": 8}]
    (tmp_path / "c.json").write_text(
        json.dumps([rows[0] | {"video": "TVQA/z"}, rows[0], rows[1] | {"video": "TVQA/z"}])
    )
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "m.yaml").write_text(
        "datasets:\n"
        "  - {json_path: a.json}\n"
        "  - {json_path: b.json, folder_fps: 2}\n"
        "  - {json_path: vqa_tvqa-tvqa_123k.jsonl, data_root: frames, video_read_type: img}\n"
        "  - {json_path: vqa_tvqa-tvqa_123k.jsonl, folder_fps: 1}\n"
        "  - {json_path: c.json}\n"
        "  - {json_path: c.json, folder_fps: 1}\n"
    )
    read = [row for spec in read_mixture(str(tmp_path / "m.yaml")) for row in read_rows(spec, seed=0)]
    rates = [row.media_options.folder_fps for row in read if isinstance(row, Row)]
    assert rates == [None, 2, 8, 3, 1, 3, None, 8, 1, 1, 8]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{json_path: a.json, folder_fps: fast}", "folder_fps is 'fast'; write a number of pictures"),
        ("{json_path: a.json, folder_fps: 0}", "folder_fps is 0"),
        ("{json_path: gone.json}", "gone.json: no such file"),
        ("{json_path: a.json, data_root: nowhere}", "nowhere: no such file or folder; correct data_root"),
        ("{json_path: a.json, data_root: 'https://x.org/a'}", "write the folder that you downloaded it to"),
        ("{json_path: a.json, sampling_strateggy: all}", "unknown key 'sampling_strateggy'"),
        ("{json_path: a.json, weight: 0}", "weight is 0"),
        ("{json_path: a.json, weight: 0.0001}", "weight is 0.0001; write a number from 0.001 to 1000"),
        ("{json_path: a.json, media_type: sound}", "media_type is 'sound'"),
        ("{json_path: a.json, video_read_type: avi}", "video_read_type is 'avi'; write one of decord"),
        ("{json_path: a.json, options: {x: 1}}", "unknown option 'x'"),
        ("{json_path: a.txt}", "does not tell its format"),
        ("{sampling_strategy: all}", "json_path must name"),
    ],
)
def test_mistakes_in_a_mixture_name_the_data_set(tmp_path: Path, entry: str, words: str) -> None:
    write_rows(tmp_path / "a.json", 1)
    file = tmp_path / "m.yaml"
    file.write_text(f"datasets:\n  - {{json_path: a.json}}\n  - {entry}\n")
    with pytest.raises(UserError) as caught:
        read_mixture(str(file))
    assert str(caught.value).startswith(f"{file}: datasets[1]: ") and words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("datasets:\n  - {json_path: a.json, json_path: b.json}\n", "line 2 .*'json_path' appears twice"),
        (
            "datasets:\n- json_path: x.json\n- json_path: a.json\n  data_root: b\n\n  data_root: c\n",
            "line 6 .*'data_root' appears twice with different values in the data set a.json",
        ),
        ("datasets: []\ndatasets: [a]\n", "line 2 .*'datasets' appears twice"),
        ("datasets: [\n - {a: b", "line 2 is no valid YAML .expected"),
        ("datasets: \x01", "unknown characters"),
    ],
)
def test_yaml_that_would_lose_something(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        read_mixture(str(tmp_path / "m.yaml"))


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.json", 1)
    (tmp_path / "m.yaml").write_text(
        "datasets:\n  - &a {json_path: a.json, weight: 2}\n  - {<<: *a, weight: 3}\n"
    )
    assert [spec.weight for spec in read_mixture(str(tmp_path / "m.yaml"))] == [2, 3]


def test_anchors_at_the_top_level(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.json", 1)
    (tmp_path / "media").mkdir()
    (tmp_path / "m.yaml").write_text(
        "root: &root media\n"
        "defaults:\n  heavy: &heavy {weight: 2, data_root: *root}\n  twice: &twice {<<: *heavy, weight: 4}\n"
        "datasets:\n"
        "  - {<<: *heavy, json_path: a.json}\n"
        "  - {<<: *twice, json_path: a.json}\n"
        "  - {<<: *twice, json_path: a.json, weight: 8}\n"
    )
    specs = read_mixture(str(tmp_path / "m.yaml"))
    assert [(spec.weight, spec.root) for spec in specs] == [(w, f"{tmp_path}/media") for w in (2, 4, 8)]
    (tmp_path / "m.yaml").write_text("skip_mising: true\ndatasets: [{json_path: a.json}]\n")
    with pytest.raises(UserError, match="unknown key 'skip_mising'; known: datasets, skip_missing"):
        read_mixture(str(tmp_path / "m.yaml"))


# In the form of VideoChat-Flash's stage files: web pages as roots, a key repeated, a set that nobody has.
STAGE = """\
datasets:
  # image sft datasets
  - json_path: annotations/image/iam(cauldron)_fix.json # 5658
    sampling_strategy: all
    data_root: https://huggingface.co/datasets/lmms-lab/OV/image/iam(cauldron)

  - json_path: https://huggingface.co/datasets/lmms-lab/M4/m4.json
    sampling_strategy: "first:50%"
    data_root: https://huggingface.co/datasets/lmms-lab/M4
  - json_path: annotations/video/vqa_tvqa-tvqa_123k.jsonl
    sampling_strategy: "all"
    data_root: https://nlp.example.org/tvqa/index.html
    video_read_type: img

    data_root: https://nlp.example.org/tvqa/index.html
  - json_path: annotations/video/timeit.json
    sampling_strategy: "first:25%"
    data_root: http://activity.example.org//train
  - json_path: annotations/video/gone.json
    data_root: http://gone.example.org/
"""


def test_a_mixture_of_web_pages_is_read_with_a_map(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (
        "hf/OV/image/iam(cauldron)",
        "hf/M4",
        "frames",
        "anet/train",
        "there/image",
        "there/video",
    ):
        (tmp_path / folder).mkdir(parents=True)
    annotations = {
        "there/image/iam(cauldron)_fix.json": 1, "hf/M4/m4.json": 4,
        "there/video/vqa_tvqa-tvqa_123k.jsonl": 1, "there/video/timeit.json": 4,
    }  # fmt: skip
    for name, rows in annotations.items():
        write_rows(tmp_path / name, rows)
    mixture, paths = tmp_path / "stage.yaml", tmp_path / "map.yaml"
    mixture.write_text(STAGE)
    with pytest.raises(UserError) as caught:
        read_mixture(str(mixture))
    message = str(caught.value)
    assert message.startswith(
        f"{mixture}: datasets[0]: on another machine: https://huggingface.co/datasets/lmms-lab/OV/image/iam(cauldron)"
        ", https://huggingface.co/datasets/lmms-lab/M4/m4.json, https://huggingface.co/datasets/lmms-lab/M4, "
    )
    assert "--path-map MAP.yaml, one `address: folder` per line" in message
    paths.write_text(
        "https://huggingface.co/datasets/lmms-lab: hf\n"
        "https://huggingface.co/datasets/lmms-lab/OV/image: hf/OV/image/\n"
        "https://nlp.example.org/tvqa/index.html: frames\n"
        f"http://activity.example.org: {tmp_path}/anet\n"
        "annotations: there\n"
        "annotations/video/gone.json: null\n"
    )
    in_full = paths.read_text()
    paths.write_text(in_full.replace("annotations: there\n", ""))
    with pytest.raises(
        UserError, match="no such file or folder; correct json_path or map it with --path-map"
    ):
        read_mixture(str(mixture), path_map=str(paths))
    paths.write_text(in_full)
    caplog.clear()
    specs = read_mixture(str(mixture), path_map=str(paths))
    assert "line 15 repeats 'data_root' with the same value" in caplog.text
    assert f"datasets[4]: left out, as {paths} says" in caplog.text
    roots = ["hf/OV/image/iam(cauldron)", "hf/M4", "frames", "anet/train"]
    assert [os.path.normpath(spec.root) for spec in specs] == [str(tmp_path / root) for root in roots]
    read = [list(read_rows(spec, seed=0)) for spec in specs]
    assert [len(rows) for rows in read] == [1, 2, 1, 1]
    assert all(isinstance(row, Row) for rows in read for row in rows)
    assert [spec.folder_fps for spec in specs] == [None, None, 3.0, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 3\n", "'a': 3 is no mapping to a folder; write the beginning of a path, a colon and a folder"),
        ("- a\n", "maps no path; write one"),
        ("a: b\na: c\n", "line 2 is no valid YAML ('a' appears twice with different values)"),
    ],
)
def test_a_wrong_map_of_paths_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "map.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_mixture(write_rows(tmp_path / "a.json", 1), path_map=str(tmp_path / "map.yaml"))
    assert str(caught.value).startswith(f"{tmp_path}/map.yaml: ") and words in str(caught.value)


def test_bad_rows_are_reported_and_the_others_read(tmp_path: Path) -> None:
    good = {"video": "a.mp4", "conversations": TURNS}
    bad = [
        {**good, "video": "../x.mp4"},
        {**good, "image": ["a", "b"]},
        {**good, "start": 2, "end": 1},
        {"video": "a"},
    ]
    lines = [*(json.dumps(row) for row in [good, *bad]), "{oops", json.dumps(good)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    [spec] = read_mixture(str(tmp_path / "a.jsonl"))
    read = list(read_rows(spec, seed=0))
    assert [row.row for row in read] == list(range(7))
    reasons = [row.reason if isinstance(row, Fault) else "" for row in read]
    assert reasons == ["", "outside_root", "placeholders", "clip_times", "conversation", "malformed", ""]
    assert isinstance(read[1], Fault) and read[1].path == "../x.mp4"


INTERNVID = {
    "YoutubeID": "a",
    "Start_timestamp": 0,
    "End_timestamp": 1,
    "Caption": "A bar.",
    "UMT_Score": 0.4,
}
VIDEOCHAT2 = {"video": "a.mp4", "QA": [{"i": "", "q": "What?", "a": "That."}]}
MOVIECHAT = {
    "info": {"video_path": "a.mp4", "fps": 10}, "global": [{"question": "What?", "answer": "That."}],
    "breakpoint": [], "caption": "",
}  # fmt: skip
VRIPT = {"meta": {}, "data": {"s": {"video_id": "a", "clip_id": "s", "caption": {"content": "A bar."}}}}
LLAVA = {"video": "a.mp4", "conversations": TURNS}


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", json.dumps([VIDEOCHAT2]), "videochat2"),
        ("a.json", json.dumps([INTERNVID], indent=1), "internvid"),
        ("a.json", f"{json.dumps(INTERNVID)}\n{json.dumps(INTERNVID)}", "internvid"),
        ("a.jsonl", f"{{oops\n\n{json.dumps(INTERNVID)}\n", "internvid"),
        ("a.json", json.dumps(MOVIECHAT, indent=1), "moviechat"),
        ("a.json", json.dumps(VRIPT | {"more": "x" * 200_000}), "vript"),
        ("a.jsonl", json.dumps(VRIPT), "vript"),
        ("a.json", "\ufeff" + json.dumps([{"id": 0}, LLAVA | {"more": "x" * 200_000}]), "llava"),
        ("a.json", json.dumps([LLAVA | {"info": 1, "data": 2}]), "llava"),
        ("{a,b}.json", json.dumps([VIDEOCHAT2]), "videochat2"),
    ],
)  # fmt: skip
def test_rows_tell_the_format(tmp_path: Path, name: str, content: str, kind: str) -> None:
    for file in expand_files(name):
        (tmp_path / file).write_text(content, encoding="utf-8")
    (tmp_path / "m.yaml").write_text(f"datasets: [{{json_path: '{name}'}}]")
    specs = read_mixture(str(tmp_path / "m.yaml"))
    for spec in specs:
        assert spec.format == kind
        assert any(
            isinstance(row, Row) and row.turns[-1].role == "assistant" for row in read_rows(spec, seed=0)
        )
    assert len(specs) == len(expand_files(name))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"image": "a.jpg", "text": "B"}], "a.json: its fields ('image', 'text') do not tell its format"),
        ([{}], "a.json: its fields (no fields) do not tell its format; set format to one of llava"),
        ([LLAVA | VIDEOCHAT2], "a.json: its rows have fields of several formats (QA, conversations); set"),
    ],
)  # fmt: skip
def test_rows_that_tell_no_format_are_named(tmp_path: Path, rows: list[Any], words: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps([LLAVA]))
    mixture = tmp_path / "m.yaml"
    mixture.write_text("datasets: [{json_path: b.json}, {json_path: a.json}]")
    with pytest.raises(UserError) as error:
        read_mixture(str(mixture))
    assert f"m.yaml: datasets[1]: {tmp_path}/{words}" in str(error.value)
    mixture.write_text("datasets: [{json_path: a.json, format: llava}]")
    assert read_mixture(str(mixture))[0].format == "llava"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.json", "no such file or folder; correct it"),
        ("a.txt", "its name does not tell its format; set format to one of llava, .* in a mixture"),
        (
            "a.json",
            r"its fields \('foo'\) do not tell its format; set format to one of .* in a mixture",
        ),
    ],
)
def test_a_file_without_a_mixture_is_named_once(tmp_path: Path, name: str, words: str) -> None:
    """The message names no field of a mixture where there is no mixture."""
    for there in ("a.txt", "a.json"):
        (tmp_path / there).write_text('[{"foo": 1}]')
    with pytest.raises(UserError) as error:
        read_mixture(str(tmp_path / name))
    assert re.fullmatch(f"{re.escape(str(tmp_path))}/{name}: {words}", str(error.value))


def test_a_folder_of_media_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.json", 1)
    folder = os.fsdecode(bytes(tmp_path) + b"/\xe9")
    os.mkdir(folder)
    with pytest.raises(UserError, match=r"/\?: the name of a folder of media must be UTF-8; rename it"):
        read_mixture(str(tmp_path / "a.json"), media_root=folder)


def test_files_of_a_pattern_are_of_one_format(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([LLAVA]))
    (tmp_path / "b.json").write_text(json.dumps([VIDEOCHAT2]))
    (tmp_path / "m.yaml").write_text("datasets: [{json_path: '{a,b}.json'}]")
    with pytest.raises(
        UserError, match=r"several formats \(.*a.json of llava, .*b.json of videochat2\); list"
    ):
        read_mixture(str(tmp_path / "m.yaml"))


def test_absolute_paths_inside_the_root_become_relative(tmp_path: Path) -> None:
    origin = Origin("row", 0, DatasetSpec("a", "a.json", "llava", str(tmp_path)))
    assert origin.media_path(f"{tmp_path}/x/../a.mp4") == "a.mp4"
    assert origin.media_path("s.tar::k.mp4@1+2") == "s.tar::k.mp4@1+2"
    for name in (f"{tmp_path}/../a.mp4", str(tmp_path), f"{tmp_path}x/a.mp4", "../s.tar::k"):
        with pytest.raises(DataError, match="is not below data_root"):
            origin.media_path(name)
    free = Origin("row", 0, origin.spec, allow_outside=True)
    assert free.media_path("/else/a.mp4") == "/else/a.mp4"


@pytest.mark.parametrize(("name", "count"), [("stage1_mixture.yaml", 2), ("stage2_mixture.yaml", 25)])
def test_the_mixtures_of_the_configs_can_be_read(tmp_path: Path, name: str, count: int) -> None:
    """Every path that they name is an empty file or folder here."""
    source = CONFIGS / name
    (tmp_path / "configs").mkdir()
    mixture = shutil.copy(source, tmp_path / "configs")
    for entry in yaml.safe_load(source.read_text())["datasets"]:
        for path in expand_files(str(tmp_path / "configs" / entry.get("json_path", entry.get("path")))):
            file = Path(os.path.normpath(path.replace("*", "00000")))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch() if file.suffix else file.mkdir()
        root = entry.get("data_root")
        if root:
            Path(os.path.normpath(tmp_path / "configs" / root)).mkdir(parents=True, exist_ok=True)
    specs = read_mixture(mixture)
    assert len(specs) == count == len({spec.name for spec in specs})
    assert f"crosslmm data index configs/{name} --out data/{name[:6]}/index" in source.read_text()
    config = (CONFIGS / {"stage1": "stage1_align.py", "stage2": "stage2_instruct.py"}[name[:6]]).read_text()
    assert f"configs/{name}" in config and f'index="data/{name[:6]}/index"' in config


def test_mixtures_of_the_configs_name_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"stage1_mixture.yaml: datasets\[0\]: .*\.parquet: no such file"):
        read_mixture(str(CONFIGS / "stage1_mixture.yaml"))
    with pytest.raises(UserError, match="names no data set that exists"):
        read_mixture(str(CONFIGS / "stage2_mixture.yaml"))
