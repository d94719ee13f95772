"""Counts of damaged frames: in the index, in what `data check` prints, and in what both refuse."""

import json
from pathlib import Path
from typing import Any

import pytest
from video_files import spoil_packets
from zoo import FRAMES, STRUCTURES, write

from crosslmm_jax.cli.app import main
from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.index import build_index, open_index
from crosslmm_jax.data.index.table import map_table
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.media import video
from crosslmm_jax.errors import Fault

TALK = {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A bar."}]}
LOST = {"good.mp4": 0, "one.mp4": 1, "many.mp4": 15}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Annotations of three videos, of which some frames are damaged."""
    for name, lost in LOST.items():
        assert write(tmp_path / name, *STRUCTURES["h264-every"])
        spoil_packets(tmp_path / name, list(range(1, 1 + lost)))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"video": name} | TALK for name in LOST]))
    return path


def counts(index: Path) -> list[list[int | None]]:
    """The column of damaged frames of all good rows."""
    tables = [map_table(index / file).column("damaged") for file in open_index(index).files]
    return [row for table in tables for row in table.to_pylist()]


def test_the_index_counts_damaged_frames(rows: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    options: dict[str, Any] = {"tokenizer": str(tokenizer_folder), "quiet": True}
    index = tmp_path / "index"
    assert build_index(str(rows), index, **options).bad == {"corrupt": 1}
    assert counts(index) == [[0], [1]]
    assert f"15 of its {FRAMES} frames are lost, above max_damaged, 0.1" in (index / "bad.jsonl").read_text()
    assert build_index(str(rows), index, **options).reused == 2
    assert write(tmp_path / "many.mp4", *STRUCTURES["h264-every"])  # encoded again, as the message says
    assert build_index(str(rows), index, **options).bad == {}
    assert counts(index) == [[0], [1], [0]]


def test_other_settings_count_again(rows: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    """What an earlier pass found is used only where a pass with the new settings would find it too."""
    options: dict[str, Any] = {"tokenizer": str(tokenizer_folder), "quiet": True}
    index = tmp_path / "index"
    assert build_index(str(rows), index, decode_up_to=FRAMES - 1, **options).bad == {"corrupt": 1}
    assert counts(index) == [[None], [1]]  # damage was met in the second, so all of it was counted
    assert "15 of its" in (index / "bad.jsonl").read_text()
    build_index(str(rows), index, decode_up_to=0, **options)
    assert counts(index) == [[None], [1], [None]]
    assert build_index(str(rows), index, max_damaged=0.5, **options).reused == 1
    assert counts(index) == [[0], [1], [15]]
    report = build_index(str(rows), index, max_damaged=0.0, **options)
    assert (report.reused, report.bad) == (1, {"corrupt": 2})


def test_commands(
    rows: Path, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = str(tmp_path / "index")
    words = ["--out", index, "--tokenizer", str(tokenizer_folder), "--workers", "0"]
    assert main(["data", "index", str(rows), *words, "--decode-up-to", "0"]) == 0
    assert counts(Path(index)) == [[None]] * 3
    capsys.readouterr()
    check = ["data", "check", index, "--workers", "0", "--sampling.frames", "2"]
    assert main(check) == 1
    out = capsys.readouterr().out
    assert f"damaged\t{tmp_path}/one.mp4: 1 of {FRAMES} frames are damaged" in out
    assert "row 2\tcorrupt" in out and "1 bad (1 corrupt)" in out
    assert "videos with damaged frames: 1" in out
    assert main([*check, "--max-damaged", "0.5"]) == 0
    assert "videos with damaged frames: 2" in capsys.readouterr().out
    assert main(["data", "index", str(rows), *words, "--decode-up-to", "all", "--max-damaged", "0.5"]) == 0
    assert counts(Path(index)) == [[0], [1], [15]]
    assert main(["data", "index", str(rows), *words, "--max-damaged", "2"]) == 2
    assert "--max-damaged: 2 is not within 0..1" in capsys.readouterr().err


def test_training_reads_a_long_video_by_the_count_of_the_index(
    rows: Path, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    build_index(str(rows), index, tokenizer=str(tokenizer_folder), decode_up_to=None, quiet=True)
    config = DataConfig(
        index=str(index), tokenizer=str(tokenizer_folder), batch_size=1,
        sampling=SamplingConfig(frames=FRAMES), max_bad_fraction=1.0,
    )  # fmt: skip
    dataset = Dataset(config, tokens_per_frame=1, image_size=16)
    for name, value in (("WHOLE_UP_TO", 10), ("estimate_damaged", None), ("PlainDecode", None)):
        monkeypatch.setattr(video, name, value)
    found = dataset.loader.load(1, dataset.buckets[dataset.bucket_numbers([1])[0]])
    assert not isinstance(found, Fault) and found.clips[0].damaged == 1


def test_training_refuses_what_the_setting_says(rows: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    """With the limit of the index, a row that it took is read."""
    index = tmp_path / "index"
    build_index(str(rows), index, tokenizer=str(tokenizer_folder), max_damaged=0.5, quiet=True)
    faults = {}
    for limit in (0.5, 0.1):
        config = DataConfig(
            index=str(index), tokenizer=str(tokenizer_folder), batch_size=1, max_damaged=limit,
            sampling=SamplingConfig(frames=FRAMES), max_bad_fraction=1.0,
        )  # fmt: skip
        dataset = Dataset(config, tokens_per_frame=1, image_size=16)
        found = dataset.loader.load(2, dataset.buckets[dataset.bucket_numbers([2])[0]])
        faults[limit] = found.reason if isinstance(found, Fault) else None
    assert faults == {0.5: None, 0.1: "corrupt"}
