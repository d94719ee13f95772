"""The index: its content, what a second pass reuses, and how a killed pass resumes."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from crosslmm_jax.cli.app import main
from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.annotations.mixture import read_mixture, read_rows
from crosslmm_jax.data.annotations.rows import Row
from crosslmm_jax.data.index import build as indexing
from crosslmm_jax.data.index import probe as probing
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.index.table import RowStore, map_table, open_index, write_table
from crosslmm_jax.data.reports.check import check_index
from crosslmm_jax.data.tfds_export.to_tfds import to_tfds
from crosslmm_jax.demo.synthetic import SyntheticSet, write_dataset
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import UserError


def rows_in(annotations: Path) -> list[Row]:
    (spec,) = read_mixture(str(annotations))
    return [row for row in read_rows(spec, seed=0) if isinstance(row, Row)]


@pytest.fixture
def videos(tmp_path: Path) -> SyntheticSet:
    return write_dataset(tmp_path / "set", num_train=8, num_heldout=4, seed=1)


def test_more_tables_than_a_process_may_open(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 million rows are 1,200 tables; most systems let a process open 1,024 files."""
    monkeypatch.setattr(indexing, "BLOCK", 1)
    monkeypatch.setattr(indexing, "_CHUNK", 1)
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": n, "conversations": talk} for n in range(300)]))
    index, options = tmp_path / "index", {"tokenizer": str(tokenizer_folder), "quiet": True}
    build_index(str(tmp_path / "rows.json"), index, **options)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 200, hard))
    try:
        store = RowStore(open_index(index))
        assert [store[number].row for number in [*range(300), *range(300)]] == [*range(300), *range(300)]
        assert build_index(str(tmp_path / "rows.json"), index, **options).reused == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_it_holds_every_row_and_what_a_probe_tells(synthetic: SyntheticSet, make_index) -> None:
    index = open_index(make_index(synthetic.train))
    expected = rows_in(synthetic.train)
    store = RowStore(index)
    assert len(store) == len(expected) == 64
    assert [store[number] for number in range(64)] == expected
    columns = index.columns()
    assert (columns.modality == 3).all() and (columns.media_per_row == 1).all()
    np.testing.assert_allclose(columns.duration, 2.0)
    assert (columns.num_frames == 8).all() and (columns.fps == 4).all()
    assert (columns.text_tokens > columns.plain_tokens).all() and (columns.plain_tokens > 0).all()
    assert (columns.end == np.inf).all()
    with pytest.raises(IndexError):
        store[64]


@pytest.mark.slow
def test_workers_make_the_same_index(
    videos: SyntheticSet, make_index, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_CHUNK", 8)
    one, two = make_index(videos.train), make_index(videos.train, workers=2)
    assert open_index(one).digest == open_index(two).digest
    tables = [map_table(folder / "rows-00000-00000.arrow").drop_columns(["stamp"]) for folder in (one, two)]
    assert tables[0].equals(tables[1])
    monkeypatch.setattr(indexing, "BLOCK", 16)  # so that there are blocks enough for two processes to look at
    reports = [
        build_index(str(videos.train), two, tokenizer=str(tokenizer_folder), workers=2, quiet=True)
        for _ in range(2)
    ]
    assert [report.reused for report in reports] == [32, 32]


def counted_probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    probed: list[str] = []
    real = probing._probe

    def counting(row: Row, reference: str, **options):
        probed.append(reference)
        return real(row, reference, **options)

    monkeypatch.setattr(probing, "_probe", counting)
    return probed


def test_only_what_changed_is_probed_again(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    probed = counted_probes(monkeypatch)
    build_index(str(videos.train), tmp_path / "index", **options)
    assert len(probed) == 8
    probed.clear()
    report = build_index(str(videos.train), tmp_path / "index", **options)
    assert (report.rows, report.reused, probed) == (32, 32, [])
    os.utime(videos.folder / "videos/train_00003.mp4", ns=(1, 1))  # a file that changed
    rows = json.loads(videos.train.read_text())
    rows[0]["conversations"][1]["value"] = "another answer"  # a row that changed
    videos.train.write_text(json.dumps(rows[:-4] + rows[:1]))  # rows removed and added
    before = open_index(tmp_path / "index").digest
    report = build_index(str(videos.train), tmp_path / "index", **options)
    assert set(probed) == {"videos/train_00000.mp4", "videos/train_00003.mp4"}
    assert report.rows == 29 and report.reused == 29 - 2 - 4
    assert open_index(tmp_path / "index").digest != before
    probed.clear()
    write_default_tokenizer(tmp_path / "other", vocab_size=400)
    old = open_index(tmp_path / "index")
    report = build_index(str(videos.train), tmp_path / "index", tokenizer=str(tmp_path / "other"), quiet=True)
    new = open_index(tmp_path / "index")
    assert probed == [] and new.tokenizer != old.tokenizer
    assert report.reused == 29


def test_a_pass_that_was_stopped_goes_on(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_CHUNK", 4)
    monkeypatch.setattr(indexing, "BLOCK", 8)
    real, calls = probing.Prober.__call__, []

    def failing(self, chunk):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, chunk)

    monkeypatch.setattr(probing.Prober, "__call__", failing)
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    with pytest.raises(KeyboardInterrupt):
        build_index(str(videos.train), tmp_path / "index", **options)
    assert not (tmp_path / "index").exists()
    probed = counted_probes(monkeypatch)
    report = build_index(str(videos.train), tmp_path / "index", **options)
    assert report.rows == 32 and 0 < report.reused <= 20 and len(probed) < 8
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == [
        "bad.jsonl", "meta.json", *(f"rows-00000-0000{n}.arrow" for n in range(4)),
    ]  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert [RowStore(open_index(tmp_path / "index"))[n] for n in range(32)] == rows_in(videos.train)


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_half_made(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    words = [
        "data",
        "index",
        str(videos.train),
        "--out",
        str(out),
        "--tokenizer",
        str(tokenizer_folder),
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "crosslmm_jax.cli", *words],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    limit = time.monotonic() + 60
    while not (tmp_path / ".index.building").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert main(words) == 0
    assert len(open_index(out)) == 32


def test_bad_rows_are_reported_one_a_line(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (videos.folder / "videos/train_00001.mp4").unlink()
    (videos.folder / "videos/train_00002.mp4").write_text("no video")
    rows = json.loads(videos.train.read_text())
    rows += [{"id": "x", "video": "../up.mp4", "conversations": rows[0]["conversations"]}, "no row"]
    videos.train.write_text(json.dumps(rows))
    words = ["data", "index", str(videos.train), "--out", str(tmp_path / "index")]
    assert main([*words, "--tokenizer", str(tokenizer_folder), "--workers", "0"]) == 0
    assert "24 rows (0 unchanged), 10 bad" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "index" / "bad.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [4, 5, 6, 7, 8, 9, 10, 11, 32, 33]
    assert [line["reason"] for line in lines] == ["missing"] * 4 + ["wrong_type"] * 4 + [
        "outside_root",
        "malformed",
    ]
    assert lines[0]["path"] == "videos/train_00001.mp4" and lines[8]["path"] == "../up.mp4"
    assert all({"row", "path", "reason", "where", "detail", "dataset"} == set(line) for line in lines)


@pytest.mark.slow
def test_links_out_of_the_root_only_when_allowed(
    videos: SyntheticSet, make_index, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "_CHUNK", 8)  # several tasks, so that the worker below is started
    linked = videos.folder / "videos/train_00001.mp4"
    linked.rename(tmp_path / "elsewhere.mp4")
    linked.symlink_to(tmp_path / "elsewhere.mp4")
    index = make_index(videos.train)
    faults = [json.loads(line)["reason"] for line in (index / "bad.jsonl").read_text().splitlines()]
    assert faults == ["outside_root"] * 4 and len(open_index(index)) == 28
    for workers in (0, 1):
        index = make_index(videos.train, allow_outside=True, workers=workers)
        assert len(open_index(index)) == 32
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    assert build_index(str(videos.train), index, **options).bad == {"outside_root": 4}  # no longer allowed
    assert build_index(str(videos.train), index, allow_outside=True, **options).reused == 28


def test_no_good_row_is_an_error(videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, capfd) -> None:
    for path in (videos.folder / "videos").iterdir():
        path.unlink()
    words = ["data", "index", str(videos.train), "--out", str(tmp_path / "index")]
    assert main([*words, "--tokenizer", str(tokenizer_folder), "--workers", "0"]) == 2
    assert "no usable row (32 missing); " in capfd.readouterr().err
    assert not (tmp_path / "index").exists()
    assert len((tmp_path / ".index.building" / "bad.jsonl").read_text().splitlines()) == 32


def test_an_index_stays_when_no_medium_is_there(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    index = tmp_path / "index"
    build_index(str(videos.train), index, **options)
    digest = open_index(index).digest
    (videos.folder / "videos").rename(videos.folder / "away")  # like a disk that is not mounted
    with pytest.raises(UserError, match="no usable row .32 missing., so the old index stays; ") as caught:
        build_index(str(videos.train), index, **options)
    report = Path(str(caught.value).split("; see ")[1])
    assert len(report.read_text().splitlines()) == 32
    assert open_index(index).digest == digest
    (videos.folder / "away").rename(videos.folder / "videos")
    probed = counted_probes(monkeypatch)
    assert build_index(str(videos.train), index, **options).reused == 32 and probed == []
    assert (index / "bad.jsonl").read_text() == ""


def test_an_index_serves_any_working_folder(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(videos.folder)
    build_index(videos.train.name, tmp_path / "index", tokenizer=str(tokenizer_folder), quiet=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert check_index(str(tmp_path / "index"), sampling=SamplingConfig(frames=2), quiet=True) == (32, [])


def test_parts_that_begin_behind_the_end(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = json.loads(videos.train.read_text())[:4]  # of 2 seconds
    for row, start in zip(rows, (0, 1.5, 2, 60), strict=True):
        row |= {"start": start, "end": 61}
    videos.train.write_text(json.dumps(rows))
    index, packed = tmp_path / "index", tmp_path / "packed"
    build_index(str(videos.train), index, tokenizer=str(tokenizer_folder), quiet=True)
    to_tfds(str(videos.train), packed, quiet=True)
    for folder in (index, packed):
        lines = [json.loads(line) for line in (folder / "bad.jsonl").read_text().splitlines()]
        assert [(line["row"], line["reason"]) for line in lines] == [(2, "clip_times"), (3, "clip_times")]
        assert "start 60 is not within the video, which lasts 2 seconds" in lines[1]["detail"]
    assert check_index(str(index), sampling=SamplingConfig(frames=2), quiet=True) == (2, [])


def test_an_index_that_is_made_anew_is_not_read_on(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables of a rebuilt index have other rows under the same numbers."""
    monkeypatch.setattr(indexing, "BLOCK", 16)
    monkeypatch.setattr(indexing, "_CHUNK", 16)
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    build_index(str(videos.train), tmp_path / "index", **options)
    store = RowStore(open_index(tmp_path / "index"))
    first = store[0]
    videos.train.write_text(json.dumps(json.loads(videos.train.read_text())[1:]))
    build_index(str(videos.train), tmp_path / "index", **options)
    assert store[0] == first  # its table is open
    with pytest.raises(UserError, match="index: was rebuilt while it was read; start again"):
        store[20]


def test_the_digest_does_not_hang_on_where_tables_end(
    videos: SyntheticSet, make_index, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_index(make_index(videos.train))
    monkeypatch.setattr(indexing, "BLOCK", 5)
    parts = open_index(make_index(videos.train))
    assert len(parts.files) == 7 and len(whole.files) == 1 and parts.digest == whole.digest


def test_an_index_may_be_a_link_to_another_disk(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    link = tmp_path / "here" / "index"
    link.symlink_to(tmp_path / "disk" / "index")
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    reused = [build_index(str(videos.train), link, **options).reused for _ in range(2)]
    assert reused == [0, 32] and len(open_index(tmp_path / "disk" / "index")) == 32
    assert link.is_symlink() and [path.name for path in link.parent.iterdir()] == ["index"]


def test_an_index_of_an_earlier_version_is_made_again(
    videos: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    index = tmp_path / "index"
    build_index(str(videos.train), index, **options)
    table = pa.table(map_table(index / "rows-00000-00000.arrow")).drop_columns(
        ["answer_tokens", "answer_media"]
    )
    write_table(index / "rows-00000-00000.arrow", table)
    meta = json.loads((index / "meta.json").read_text())
    (index / "meta.json").write_text(json.dumps(meta | {"version": 2}))
    with pytest.raises(UserError, match="has version 2 and .* make the index anew with `crosslmm data index"):
        open_index(index)
    probed = counted_probes(monkeypatch)
    report = build_index(str(videos.train), index, **options)
    assert (report.rows, report.reused, len(probed)) == (32, 0, 8)
    assert (open_index(index).columns().answer_media == 1).all()


def test_what_is_no_index(tmp_path: Path, videos: SyntheticSet, tokenizer_folder: Path) -> None:
    with pytest.raises(UserError, match="no index; make it with `crosslmm data index"):
        open_index(tmp_path / "nothing")
    with pytest.raises(UserError, match="exists and is no index"):
        build_index(str(videos.train), videos.folder, tokenizer=str(tokenizer_folder), quiet=True)
    with pytest.raises(UserError, match="train.json: is no folder; name the INDEX"):
        open_index(videos.train)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "meta.json").write_text("{}")
    with pytest.raises(UserError, match="meta.json: cannot be read"):
        open_index(tmp_path / "bad")


@pytest.mark.parametrize("option", ["--workers=-1", "--sample=-3", "--sample=all"])
def test_counts_are_checked(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "index", option]) == 2
    assert f"{option.partition('=')[2]!r} is not a whole number" in capsys.readouterr().err


def test_stats_and_check(videos: SyntheticSet, make_index, capsys: pytest.CaptureFixture[str]) -> None:
    index = make_index(videos.train)
    assert main(["data", "stats", str(index), "--sampling.frames", "4", "--batch-size", "8"]) == 0
    out = capsys.readouterr().out
    assert "32 rows, 32 media" in out and "video" in out and "0.0%  padded frames" in out
    assert "truncated: 0 rows" in out and "left out: 0 rows" in out
    words = ["data", "stats", str(index), "--sampling.frames", "4", "--time-instruction", "short"]
    assert main([*words, "--max-text-tokens", "60"]) == 2
    assert "none of the 32 rows" in capsys.readouterr().err
    assert main(["data", "check", str(index), "--workers", "0"]) == 0
    assert "32 rows decoded, 0 bad" in capsys.readouterr().out
    (videos.folder / "videos/train_00002.mp4").write_text("no video")
    count, bad = check_index(str(index), sampling=SamplingConfig(frames=4), quiet=True)
    assert count == 32 and [row.row for row in bad] == [8, 9, 10, 11]
    assert main(["data", "check", str(index), "--sample", "5", "--workers", "0"]) in (0, 1)
    assert "5 rows decoded" in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_tokenizer_tokens_are_counted_as_the_tiny_model_does(
    videos: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data", "index", str(videos.train), "--out", str(tmp_path / "index"), "--workers", "1"]
    assert main(words) == 0
    assert "32 rows (0 unchanged), 0 bad" in (out := capsys.readouterr().out) and "--tokenizer DIR" in out
    write_default_tokenizer(tmp_path / "tokenizer")
    assert main([*words, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert "32 rows (32 unchanged), 0 bad" in (out := capsys.readouterr().out)
    assert "small tokenizer" not in out
