"""Mixtures written as records: rows read back equal, stops cost little, nothing is overwritten."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from lookalikes import write_image, write_tfds, write_video
from video_files import assert_same

from crosslmm_jax.cli.app import main
from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.annotations.mixture import read_mixture, read_rows
from crosslmm_jax.data.annotations.rows import Row
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.loader import BatchIterator
from crosslmm_jax.data.media.locate import open_media
from crosslmm_jax.data.media.video import probe, read_frames
from crosslmm_jax.data.tfds_export import shard_writer
from crosslmm_jax.data.tfds_export.to_tfds import to_tfds
from crosslmm_jax.errors import UserError

FOUR = SamplingConfig(frames=4)
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bar."}]


def rows_in(mixture: Path) -> list[Row]:
    found = [row for spec in read_mixture(str(mixture)) for row in read_rows(spec, seed=0)]
    return [row for row in found if isinstance(row, Row)]


def brief(row: Row) -> tuple[Any, ...]:
    return row.dataset, row.modality, row.bounds, row.turns, row.media_options, len(row.media)


@pytest.fixture(scope="module")
def packed(lookalikes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The look-alikes of all formats, written to several files of records."""
    out = tmp_path_factory.mktemp("packed") / "set"
    assert to_tfds(str(lookalikes / "mixture.yaml"), out, shard_mb=0.03, quiet=True).shards > 1
    return out


def test_rows_and_frames_come_back(lookalikes: Path, packed: Path) -> None:
    wanted, found = rows_in(lookalikes / "mixture.yaml"), rows_in(packed / "mixture.yaml")
    assert [brief(row) for row in found] == [brief(row) for row in wanted] and len(found) == 40
    assert {row.modality for row in found} == {"text", "image", "multi_image", "video"}
    for one, other in zip(found, wanted, strict=True):
        for copy, original in zip(one.media, other.media, strict=True):
            copy, original = open_media(one.root, copy), open_media(other.root, original)
            assert probe(copy) == probe(original)
            frames = [read_frames(medium, FOUR, size=24, bounds=one.bounds) for medium in (copy, original)]
            assert_same(*frames)
    # Also as one data set.
    assert [row.turns for row in rows_in(packed)] == [row.turns for row in wanted]


def test_media_are_kept_byte_for_byte(lookalikes: Path, packed: Path) -> None:
    row = next(row for row in rows_in(packed) if row.modality == "video")
    assert open_media(row.root, row.media[0]).data == (lookalikes / "media" / "one.mp4").read_bytes()


def test_weights_and_bad_rows_are_kept(
    lookalikes: Path, packed: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    weights = {spec.name: spec.weight for spec in read_mixture(str(lookalikes / "mixture.yaml"))}
    assert {spec.name: spec.weight for spec in read_mixture(str(packed / "mixture.yaml"))} == weights
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    build_index(str(lookalikes / "mixture.yaml"), tmp_path / "index", **options)
    told = [(folder / "bad.jsonl").read_text().splitlines() for folder in (packed, tmp_path / "index")]
    assert sorted(told[0]) == sorted(told[1]) and len(told[0]) == 26
    report = build_index(str(packed / "mixture.yaml"), tmp_path / "other", **options)
    assert (report.rows, report.bad) == (40, {})


def test_tfds_opens_it_where_it_lies_and_elsewhere(packed: Path, tmp_path: Path) -> None:
    rows = rows_in(packed)
    moved = tmp_path / "other name"
    shutil.copytree(packed, moved)
    for folder in (packed, moved):
        source = tfds.builder_from_directory(folder).as_data_source("train")
        assert len(source) == len(rows)
        for example, row in zip(source, rows, strict=True):
            said = [text.decode() for text in example["conversations"]["content"]]
            assert said == [turn.text for turn in row.turns]
            files = list(example["videos" if row.modality == "video" else "images"])
            assert len(files) == sum(example["media_files"]) and len(row.media) == len(example["media_files"])
    shards = len(list(packed.glob("*array_record*")))
    assert sorted(path.name for path in packed.iterdir()) == [
        "bad.jsonl", "dataset_info.json", "features.json", "mixture.yaml",
        *(f"set-train.array_record-{n:05d}-of-{shards:05d}" for n in range(shards)), "to_tfds.json",
    ]  # fmt: skip


@pytest.fixture
def stills(tmp_path: Path) -> Path:
    """Annotations of twelve images."""
    for number in range(12):
        write_image(tmp_path / "m" / f"{number}.jpg", number)
    rows = [{"id": number, "image": f"{number}.jpg", "conversations": TURNS} for number in range(12)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.yaml").write_text("datasets: [{json_path: a.json, data_root: m}]")
    return tmp_path / "a.yaml"


def test_what_is_written_may_be_a_link_to_another_disk(stills: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "set")
    assert to_tfds(str(stills), tmp_path / "link", quiet=True).rows == 12
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "set" / "mixture.yaml").is_file()


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_and_workers(stills: Path, tmp_path: Path) -> None:
    reports = {}
    for shards in (1, 4, 100):
        reports[shards] = to_tfds(str(stills), tmp_path / f"{shards}", shards=shards, quiet=True)
        pictures = [open_media(row.root, row.media[0]).data for row in rows_in(tmp_path / f"{shards}")]
        assert pictures == [(tmp_path / "m" / f"{number}.jpg").read_bytes() for number in range(12)]
    assert {shards: report.shards for shards, report in reports.items()} == {1: 1, 4: 4, 100: 12}
    assert len({report.size_bytes for report in reports.values()}) == 1
    (tmp_path / "again").mkdir()
    to_tfds(str(stills), tmp_path / "again" / "4", shards=4, workers=2, quiet=True)
    assert content_of(tmp_path / "again" / "4") == content_of(tmp_path / "4")


def test_sizes_of_members_count_and_not_those_of_their_files(lookalikes: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    to_tfds(str(lookalikes / "mixture.yaml"), packed, quiet=True)
    assert to_tfds(str(packed), tmp_path / "again", shard_mb=0.01, quiet=True).shards > 3
    shards = str(lookalikes / "shards" / "shard-00{0,1}.tar")
    two = sum((lookalikes / "media" / name).stat().st_size for name in ("one.mp4", "a.jpg"))
    report = to_tfds(shards, tmp_path / "tars", shard_mb=two / 1e6, quiet=True)
    assert (report.rows, report.shards) == (4, 2)


def test_the_same_again_leaves_it_and_anything_else_is_refused(stills: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = to_tfds(str(stills), out, shards=3, quiet=True)
    before = content_of(out), [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    assert to_tfds(str(stills), out, shards=3, quiet=True) == report
    with pytest.raises(UserError, match="holds another mixture"):
        to_tfds(str(stills), out, shards=2, quiet=True)
    os.utime(tmp_path / "m" / "3.jpg", ns=(1, 1))
    with pytest.raises(UserError, match="files that changed since; name another folder"):
        to_tfds(str(stills), out, shards=3, quiet=True)
    assert (content_of(out), [path.stat().st_mtime_ns for path in sorted(out.iterdir())]) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and was not written by to-tfds; name another folder"):
        to_tfds(str(stills), other, quiet=True)
    with pytest.raises(UserError, match="exists and was not written by to-tfds"):
        to_tfds(str(stills), other / "mine.txt", quiet=True)
    assert content_of(other) == {"mine.txt": b"mine"}
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "empty").mkdir()
    assert to_tfds(str(stills), tmp_path / "empty", shards=3, quiet=True) == report


def test_bad_media_are_listed_with_their_reason(tmp_path: Path) -> None:
    root = tmp_path / "m"
    write_image(root / "good.jpg")
    write_video(root / "good.mp4")
    content = (root / "good.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(content[: len(content) // 2])
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("text")
    os.mkfifo(root / "pipe.mp4")
    (tmp_path / "secret.mp4").write_bytes(content)
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    names = ("good", "cut", "empty", "text", "pipe", "link", "none", "../secret")
    rows: list[dict[str, Any]] = [{"video": f"{name}.mp4", "conversations": TURNS} for name in names]
    rows.append({"image": "good.mp4", "conversations": TURNS})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.yaml").write_text("datasets: [{json_path: a.json, data_root: m}]")
    report = to_tfds(str(tmp_path / "a.yaml"), tmp_path / "out", quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [(line["row"], line["path"], line["reason"]) for line in lines] == [
        (1, "cut.mp4", "truncated"), (2, "empty.mp4", "empty"), (3, "text.mp4", "wrong_type"),
        (4, "pipe.mp4", "not_a_file"), (5, "link.mp4", "outside_root"), (6, "none.mp4", "missing"),
        (7, "../secret.mp4", "outside_root"), (8, "good.mp4", "wrong_type"),
    ]  # fmt: skip
    assert (report.rows, report.bad) == (1, dict(Counter(line["reason"] for line in lines)))
    assert all(str(tmp_path) in line["detail"] or "data_root" in line["detail"] for line in lines)
    report = to_tfds(str(tmp_path / "a.yaml"), tmp_path / "free", allow_outside=True, quiet=True)
    assert report.rows == 3


def test_a_row_larger_than_a_record_is_left_out(
    stills: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max((tmp_path / "m" / f"{number}.jpg").stat().st_size for number in range(12))
    monkeypatch.setattr(shard_writer, "_MOST_BYTES", largest - 1)
    report = to_tfds(str(stills), tmp_path / "out", quiet=True)
    assert report.bad["too_large"] >= 1 and report.rows == 12 - report.bad["too_large"]


def test_no_good_row_is_an_error(stills: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "m").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="no usable row; see .*bad.jsonl") as caught:
        to_tfds(str(stills), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    report = Path(str(caught.value).split("; see ")[1])
    assert len(report.read_text().splitlines()) == 12


KILLED = """
import os, signal, sys
from crosslmm_jax.data.tfds_export import shard_writer
from crosslmm_jax.data.tfds_export.to_tfds import to_tfds

example, count = shard_writer._example, 0

def dying(*args, **options):
    global count
    count += 1
    if count == 8:  # in the third shard of three rows
        os.kill(os.getpid(), signal.SIGKILL)
    return example(*args, **options)

shard_writer._example = dying
to_tfds(sys.argv[1], sys.argv[2], shards=4, quiet=True)
"""


def test_a_kill_costs_the_shards_under_way(
    stills: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    to_tfds(str(stills), tmp_path / "whole" / "out", shards=4, quiet=True)
    out, work = tmp_path / "out", tmp_path / ".out.building"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(stills), str(out)], timeout=100)
    assert ended.returncode == -signal.SIGKILL and not out.exists()
    assert {"shard-00000", "shard-00001", "shard-00002.incomplete"} <= {path.name for path in work.iterdir()}
    assert "shard-00002" not in {path.name for path in work.iterdir()}
    written: list[str] = []
    write = shard_writer._write_rows
    monkeypatch.setattr(
        shard_writer, "_write_rows", lambda shard, path: written.append(path) or write(shard, path)
    )
    to_tfds(str(stills), out, shards=4, quiet=True)
    assert [Path(path).name for path in written] == ["shard-00002.incomplete", "shard-00003.incomplete"]
    assert content_of(out) == content_of(tmp_path / "whole" / "out") and not work.exists()


def test_what_changed_after_a_stop_is_written_anew(
    stills: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it was stopped while it renamed files."""
    out, work = tmp_path / "out", tmp_path / ".out.building"
    monkeypatch.setattr(os, "rename", lambda *_: 1 / 0)  # publishing
    with pytest.raises(ZeroDivisionError):
        to_tfds(str(stills), out, shards=4, quiet=True)
    assert len(list(work.glob("out-train*-of-00004"))) == 4
    monkeypatch.undo()
    write_image(tmp_path / "m" / "0.jpg", 15)
    assert to_tfds(str(stills), out, shards=2, quiet=True).shards == 2
    assert len(list(out.glob("*array_record*"))) == 2
    row = rows_in(out)[0]
    assert open_media(row.root, row.media[0]).data == (tmp_path / "m" / "0.jpg").read_bytes()


FULL = """
import resource, signal, sys
from crosslmm_jax.cli.app import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def test_a_full_disk_is_told_and_the_next_try_goes_on(stills: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["data", "to-tfds", str(stills), "--out", str(out), "--workers", "0"]
    ended = subprocess.run(
        [sys.executable, "-c", FULL, "5000", *command], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and not out.exists()
    assert ".out.building/shard-00000: cannot be written (write() failed: File too large" in ended.stderr
    assert "the same command resumes" in ended.stderr
    assert not list((tmp_path / ".out.building").glob("*.incomplete"))
    assert main(command) == 0 and len(rows_in(out)) == 12


def test_command_line(stills: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "to-tfds", str(stills), "--out", str(out), "--shards", "2", "--workers", "2"]) == 0
    assert "12 rows in 2 shards" in (said := capsys.readouterr().out) and f"written: {out}" in said
    for arguments in (["--shards", "0"], ["--shard-mb", "nan"]):
        assert main(["data", "to-tfds", str(stills), "--out", str(tmp_path / "x"), *arguments]) == 2
        assert "--shards and --shard-mb must be above 0" in capsys.readouterr().err
    for command, words in ((["data", "--help"], "to-tfds"), (["data", "to-tfds", "--help"], "--shard-mb")):
        with pytest.raises(SystemExit):
            main(command)
        assert words in capsys.readouterr().out


MEMORY = """
import resource, sys
from crosslmm_jax.data.tfds_export.to_tfds import to_tfds

to_tfds(sys.argv[1], sys.argv[3], quiet=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
to_tfds(sys.argv[2], sys.argv[4], quiet=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (1400, 1000)).save(tmp_path / "a.bmp")  # 4 MB
    for name, count in (("few.json", 3), ("many.json", 60)):
        (tmp_path / name).write_text(json.dumps([{"image": "a.bmp", "conversations": TURNS}] * count))
    paths = [str(tmp_path / name) for name in ("few.json", "many.json", "few", "many")]
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 30  # MB, of 250 that are written into one file


def test_a_data_set_that_is_not_ours_is_packed_too(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    content = (tmp_path / "a.mp4").read_bytes()
    kinds = {"video": tfds.features.Text(), "caption": tfds.features.Text()}
    write_tfds(tmp_path / "theirs", kinds, [{"video": content, "caption": f"Bar {n}."} for n in range(3)])
    report = to_tfds(str(tmp_path / "theirs"), tmp_path / "ours", quiet=True)
    assert report.rows == 3
    assert [row.turns for row in rows_in(tmp_path / "ours")] == [
        row.turns for row in rows_in(tmp_path / "theirs")
    ]


@pytest.mark.slow
def test_worker_processes_read_records_and_tars(
    lookalikes: Path, packed: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """The written mixture gives the batches of the original, in this process and in grain's workers."""
    batches = []
    for number, mixture in enumerate((lookalikes, packed, packed)):
        index = tmp_path / str(number)
        build_index(str(mixture / "mixture.yaml"), index, tokenizer=str(tokenizer_folder), quiet=True)
        config = DataConfig(
            index=str(index), tokenizer=str(tokenizer_folder), batch_size=8, sampling=FOUR, max_shapes=4,
            shuffle=False, num_workers=2 if number == 2 else 0,
        )  # fmt: skip
        iterator = BatchIterator(Dataset(config, tokens_per_frame=1, image_size=32))
        batches.append([next(iterator) for _ in range(8)])
        iterator.close()
        assert iterator.faults == {}
    for other in batches[1:]:
        for one, same in zip(batches[0], other, strict=True):
            for name, values in one._asdict().items():
                np.testing.assert_array_equal(getattr(same, name), values, err_msg=name)


def test_a_folder_of_one_picture_stays_a_video(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A still image that a row calls a video stays a video, also when written a second time."""
    for name in ("one/0.png", "two/0.png", "two/1.png", "still.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_image(tmp_path / name)
    rows = [{"video": name, "conversations": TURNS} for name in ("one", "two", "still.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    to_tfds(str(tmp_path / "rows.json"), tmp_path / "packed", quiet=True)
    to_tfds(str(tmp_path / "packed/mixture.yaml"), tmp_path / "again", quiet=True)
    for mixture in (tmp_path / "packed/mixture.yaml", tmp_path / "again/mixture.yaml"):
        found = rows_in(mixture)
        media = [open_media(row.root, row.media[0]) for row in found]
        assert [probe(medium).duration for medium in media] == [1.0, 2.0, 0.0]
        assert [read_frames(medium, FOUR, size=8).frames.shape[0] for medium in media] == [4, 4, 1]
        assert [row.media[0].rpartition("/")[2] for row in found] == ["0-0.png", "0-1.png", "0.png"]
