"""An index that several machines make, and what a pass over unchanged annotations does not do again."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosslmm_jax.cli.app import main
from crosslmm_jax.data.index import build as indexing
from crosslmm_jax.data.index import probe as probing
from crosslmm_jax.data.index.blocks import Shard
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.index.publish import merge_index
from crosslmm_jax.data.index.table import RowStore, open_index
from crosslmm_jax.errors import UserError

ROWS = 40  # of each of two data sets, 10 blocks in all; two of each are bad


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(indexing, "BLOCK", 8)
    monkeypatch.setattr(indexing, "_CHUNK", 3)
    for name in "ab":
        rows = []
        for number in range(ROWS):
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{name}{number}.png")
            turns = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": f"{number}."}]
            rows.append({"image": f"{name}{number}.png", "conversations": turns})
        rows[11] = {"image": "no.png", "conversations": rows[11]["conversations"]}
        rows[30] = {"image": "b1.png"}
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "m.yaml").write_text("datasets: [{path: a.json}, {path: b.json, weight: 2}]")
    return tmp_path / "m.yaml"


@pytest.fixture
def options(tokenizer_folder: Path) -> dict:
    return {"tokenizer": str(tokenizer_folder), "quiet": True}


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    real = probing._probe
    monkeypatch.setattr(
        probing, "_probe", lambda row, name, **more: found.append(name) or real(row, name, **more)
    )
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_merge_to_the_index_of_one_machine(
    mixture: Path, options: dict, tmp_path: Path, probed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(str(mixture), tmp_path / "one", **options)
    probed.clear()
    index = tmp_path / "many rows"  # a space, so that what is pasted must be quoted
    command = ["data", "index", str(mixture), "--out", str(index), "--tokenizer", options["tokenizer"]]
    assert main([*command, "--workers", "0", "--shard", "2/3"]) == 0
    assert main(["data", "merge", str(index)]) == 2
    assert "missing or not finished: shard 0/3, 1/3; make each as" in capsys.readouterr().err
    assert main([*command, "--workers", "0", "--shard", "0/3"]) == 0
    assert len(set(probed)) < 60
    # The message about the missing shard names the command that makes it.
    assert main(["data", "merge", str(index)]) == 2
    message = capsys.readouterr().err
    assert "missing or not finished: shard 1/3; make each as" in message
    words = shlex.split(re.search("`crosslmm (.*)`", message)[1].replace("MIXTURE", str(mixture)))  # type: ignore[index]
    assert main([*words, "--tokenizer", options["tokenizer"], "--workers", "0"]) == 0
    assert f"once all are: crosslmm data merge '{index}'" in capsys.readouterr().out
    assert main(["data", "merge", str(index)]) == 0
    assert "76 rows, 4 bad" in capsys.readouterr().out
    assert content(index) == content(tmp_path / "one")
    assert len((index / "bad.jsonl").read_text().splitlines()) == 4
    assert not list(tmp_path.glob("many rows.*")) and len(set(probed)) == 76 + 1
    # Shards of a later pass take their blocks from the index.
    probed.clear()
    reports = [build_index(str(mixture), index, shard=Shard(n, 5), **options) for n in range(5)]
    assert sum(report.reused or 0 for report in reports) == 76 and set(probed) == {"no.png"}
    assert merge_index(index).rows == 76 and content(index) == content(tmp_path / "one")


def test_a_shard_goes_on_where_it_was_killed(
    mixture: Path, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: list[str]
) -> None:
    real, calls = probing.Prober.__call__, []

    def failing(prober: probing.Prober, chunk: probing.Chunk) -> probing.Found:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(prober, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(probing.Prober, "__call__", failing)
        with pytest.raises(KeyboardInterrupt):
            build_index(str(mixture), tmp_path / "many", shard=Shard(0, 2), **options)
    first = len(probed)
    # A kill between the two tables of a block leaves the first.
    (tmp_path / ".many.shard-0-of-2.building" / "bad-00000-00004.arrow").write_bytes(b"")
    for number in range(2):
        build_index(str(mixture), tmp_path / "many", shard=Shard(number, 2), **options)
    assert first > 16 and len(probed) <= 2 * ROWS + 2  # a missing file is looked for again
    assert merge_index(tmp_path / "many").rows == 76
    build_index(str(mixture), tmp_path / "one", **options)
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_shards_of_different_files_do_not_merge(mixture: Path, options: dict, tmp_path: Path) -> None:
    index = tmp_path / "many"
    build_index(str(mixture), index, shard=Shard(0, 2), **options)
    (tmp_path / "b.json").write_text((tmp_path / "b.json").read_text().replace("7.", "8."))
    build_index(str(mixture), index, shard=Shard(1, 2), **options)
    with pytest.raises(UserError, match="shard-1-of-2: was made from other .* than .*shard-0-of-2; make"):
        merge_index(index)
    part = tmp_path / "many.shard-0-of-2"
    with pytest.raises(UserError, match=f"is a part of an index; run `crosslmm data merge {index}` first"):
        open_index(part)
    build_index(str(mixture), index, shard=Shard(0, 2), **options)
    build_index(str(mixture), index, shard=Shard(2, 3), **options)
    with pytest.raises(UserError, match="many: has shards of 2 and 3; delete those of one number"):
        merge_index(index)
    shutil.rmtree(tmp_path / "many.shard-2-of-3")
    assert merge_index(index).rows == len(RowStore(open_index(index))) == 76
    with pytest.raises(UserError, match="many: there are no finished shards of it; make them with `crosslmm"):
        merge_index(index)


@pytest.mark.parametrize("text", ["3/3", "1", "a/2", "-1/2", "0/0"])
def test_what_is_no_shard(
    text: str, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "index", str(mixture), "--out", str(tmp_path / "x"), f"--shard={text}"]) == 2
    assert f"--shard is {text!r}; write K/N with K from 0 to N - 1" in capsys.readouterr().err


def test_unchanged_annotations_are_not_read_again(
    mixture: Path, options: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probed: list[str]
) -> None:
    read: list[str] = []
    real = indexing.read_entries
    monkeypatch.setattr(
        indexing, "read_entries", lambda spec, **more: read.append(spec.name) or real(spec, **more)
    )
    index = tmp_path / "index"
    build_index(str(mixture), index, **options)
    before = content(index)
    read.clear()
    probed.clear()
    report = build_index(str(mixture), index, **options)
    assert (report.rows, report.reused, report.bad) == (76, 76, {"missing": 2, "conversation": 2})
    assert read == [] and probed == ["no.png"] and content(index) == before
    # A table that cannot be read is made again, and the digest does not hang on the age of files.
    table = index / "rows-00001-00002.arrow"
    table.write_bytes(table.read_bytes()[:-100])
    assert (build_index(str(mixture), index, **options).reused, read) == (76 - 8, ["b"])
    assert content(index) == before
    digest = open_index(index).digest
    os.utime(tmp_path / "a.json", ns=(5, 5))
    read.clear()
    assert (build_index(str(mixture), index, **options).reused, read) == (76, ["a"])
    assert open_index(index).digest == digest
    # A medium that changed, or is there now, is noticed; its data set is read for the block that holds it.
    Image.new("RGB", (8, 8)).save(tmp_path / "no.png")
    read.clear()
    probed.clear()
    report = build_index(str(mixture), index, **options)
    assert (report.rows, report.reused, report.bad) == (78, 76, {"conversation": 2})
    assert read == ["a", "b"] and set(probed) == {"no.png"}
    # Rows that were added are read, the others keep their probes.
    rows = json.loads((tmp_path / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(rows + rows[:1]))
    read.clear()
    probed.clear()
    report = build_index(str(mixture), index, **options)
    assert (report.rows, report.reused, read, probed) == (79, 79, ["b"], [])
