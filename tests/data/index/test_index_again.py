"""What one pass over a mixture keeps for the next: after kills, changes, and missing or full disks."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crosslmm_jax.data.annotations.rows import Row
from crosslmm_jax.data.index import blocks
from crosslmm_jax.data.index import build as indexing
from crosslmm_jax.data.index import probe as probing
from crosslmm_jax.data.index.build import IndexReport, build_index
from crosslmm_jax.data.index.table import open_index
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import UserError

ROWS = 32


class Passes:
    """Passes over a mixture of images on two disks, ROWS rows each; counts what they probe."""

    def __init__(self, folder: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.tokenizer, self.monkeypatch = folder, tokenizer, monkeypatch
        self.probed: list[str] = []
        real = probing._probe
        monkeypatch.setattr(indexing, "_CHUNK", 4)
        monkeypatch.setattr(indexing, "BLOCK", 8)

        def counting(row: Row, reference: str, **options: Any):
            self.probed.append(reference)
            return real(row, reference, **options)

        monkeypatch.setattr(probing, "_probe", counting)
        datasets = []
        for disk in "ab":
            (folder / disk).mkdir()
            rows = []
            for number in range(ROWS):
                Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / disk / f"{number}.png")
                turns = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": f"{number}."}]
                rows.append({"image": f"{number}.png", "conversations": turns})
            (folder / f"{disk}.json").write_text(json.dumps(rows))
            datasets.append({"path": f"{disk}.json", "data_root": disk})
        (folder / "m.yaml").write_text(json.dumps({"datasets": datasets}))

    def run(self, tokenizer: Path | None = None) -> IndexReport:
        """Runs a pass; `probed` lists what it probed."""
        self.probed.clear()
        words = str(tokenizer or self.tokenizer)
        return build_index(str(self.folder / "m.yaml"), self.index, tokenizer=words, quiet=True)

    def killed(self, calls: int) -> None:
        """Runs a pass that is killed at a chunk."""
        real, made = probing.Prober.__call__, []

        def failing(prober: probing.Prober, chunk: probing.Chunk) -> Any:
            made.append(1)
            if len(made) == calls:
                raise KeyboardInterrupt
            return real(prober, chunk)

        with self.monkeypatch.context() as patch:
            patch.setattr(probing.Prober, "__call__", failing)
            with pytest.raises(KeyboardInterrupt):
                self.run()

    @property
    def index(self) -> Path:
        return self.folder / "index"

    def away(self, *disks: str) -> None:
        for disk in disks:
            (self.folder / disk).rename(self.folder / f"{disk}.away")
            (self.folder / disk).mkdir()

    def back(self, *disks: str) -> None:
        for disk in disks:
            (self.folder / disk).rmdir()
            (self.folder / f"{disk}.away").rename(self.folder / disk)


@pytest.fixture
def passes(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(tmp_path, tokenizer_folder, monkeypatch)


def test_a_killed_pass_over_changed_files_goes_on(passes: Passes) -> None:
    """The index also has a record of each row, made from the old file."""
    passes.run()
    for path in passes.folder.glob("[ab]/*.png"):
        os.utime(path, ns=(5, 5))
    passes.killed(15)
    assert len(passes.probed) == 56
    report = passes.run()
    assert (report.rows, report.reused, len(passes.probed)) == (64, 56, 8)
    for path in passes.folder.glob("a/*.png"):
        os.utime(path, ns=(7, 7))
    passes.killed(6)
    for path in passes.folder.glob("a/*.png"):
        os.utime(path, ns=(5, 5))  # the stamps that the index has, not those of the killed pass
    assert passes.run().reused == 64 and passes.probed == []


def test_a_disk_that_is_away_costs_a_killed_pass_nothing(passes: Passes) -> None:
    passes.killed(9)
    passes.away("a", "b")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no usable row .64 missing.; see .*bad.jsonl"):
            passes.run()
        assert not passes.index.exists()
    passes.back("a", "b")
    assert passes.run().reused == 32 and len(passes.probed) == 32


def test_leftovers_never_take_each_others_names(passes: Passes) -> None:
    passes.killed(9)
    passes.killed(2)
    earlier = passes.folder / ".index.building" / "earlier"
    (lost,) = earlier.glob("rows-*")  # the second pass took over the three blocks before it
    lost.unlink()  # as if a pass was killed during clean-up
    passes.killed(2)
    passes.killed(2)
    assert passes.run().reused == 24 + 4 and len(passes.probed) == 64 - 28


def test_one_disk_of_two_is_away(passes: Passes, tmp_path: Path) -> None:
    passes.run()
    passes.away("b")
    for _ in range(2):
        report = passes.run()
        assert (report.rows, report.bad, len(open_index(passes.index))) == (32, {"missing": 32}, 32)
    write_default_tokenizer(tmp_path / "other", vocab_size=400)
    assert passes.run(tmp_path / "other").rows == 32
    passes.back("b")
    report = passes.run()
    assert (report.rows, report.reused, passes.probed) == (64, 64, [])
    assert not list(passes.index.glob("bad-*"))


def test_a_disk_that_is_full(passes: Passes) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for module, name in ((blocks, "write_table"), (os, "rename")):  # os.rename: publishing
        with passes.monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(UserError, match=r"index: cannot be written .No space left on device.; free"):
                passes.run()
    assert passes.run().rows == 64


def test_a_mounted_disk_is_no_place_for_an_index(passes: Passes) -> None:
    passes.index.mkdir()
    passes.monkeypatch.setattr(os.path, "ismount", lambda path: path == passes.index)
    with pytest.raises(UserError, match="index: a disk is mounted there; name a folder inside it"):
        passes.run()
    assert passes.probed == []
