"""What the index finds about media: folders of images, odd names, files that change."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lookalikes import write_image, write_video

from crosslmm_jax.cli.app import main
from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.index.table import RowStore, open_index
from crosslmm_jax.data.media.locate import open_media
from crosslmm_jax.data.reports import check
from crosslmm_jax.data.reports.check import check_index
from crosslmm_jax.data.tfds_export.to_tfds import to_tfds
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import UserError

TALK = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bar."}]}


def test_a_broken_picture_in_a_folder_of_frames_is_found_as_a_lone_one_is(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    """The header gives the length; damage after it is found by decoding."""
    damages = {"text": b"no picture", "empty": b"", "short": None, "cut": None}
    rows = []
    for name, content in damages.items():
        for number in range(3):
            write_image(tmp_path / name / f"{number}.jpg", number)
        broken = tmp_path / name / "2.jpg"
        whole = broken.read_bytes()
        broken.write_bytes(whole[: {"short": 60, "cut": -99}[name]] if content is None else content)
        shutil.copy(broken, tmp_path / f"{name}.jpg")
        rows += [{"video": name} | TALK, {"image": f"{name}.jpg"} | TALK]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    index = tmp_path / "index"
    build_index(str(tmp_path / "rows.json"), index, tokenizer=str(tokenizer_folder), quiet=True)
    bad = [json.loads(line) for line in (index / "bad.jsonl").read_text().splitlines()]
    reasons = [(entry["row"], entry["reason"]) for entry in bad]
    assert reasons == [
        (0, "wrong_type"), (1, "wrong_type"), (2, "empty"), (3, "empty"), (4, "corrupt"), (5, "corrupt")
    ]  # fmt: skip
    assert f"{tmp_path}/text/2.jpg: cannot be read as an image" in bad[0]["detail"]
    _, failed = check_index(str(index), sampling=SamplingConfig(frames=3), quiet=True)
    assert [row.reason for row in failed] == ["truncated", "truncated"]


def test_pictures_of_a_folder_may_have_names_that_are_no_text(
    tokenizer_folder: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Such files are read, and reported where they are damaged."""
    odd = Path(os.fsdecode(bytes(tmp_path / "clip") + b"/1\xe9.jpg"))
    write_image(odd)
    write_image(tmp_path / "a.jpg")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"video": "clip"} | TALK, {"image": "a.jpg"} | TALK]))
    index, packed = tmp_path / "index", tmp_path / "packed"
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    assert build_index(str(rows), index, **options).rows == 2
    assert to_tfds(str(rows), packed, quiet=True).rows == 2
    assert build_index(str(packed / "mixture.yaml"), tmp_path / "packed_index", **options).rows == 2
    odd.write_bytes(odd.read_bytes()[:-99])
    assert main(["data", "check", str(index), "--workers", "0"]) == 1
    assert "clip/1?.jpg: cannot be read as an image" in capsysbinary.readouterr().out.decode()
    odd.write_text("no picture")
    assert build_index(str(rows), index, **options).bad == {"wrong_type": 1}
    (entry,) = [json.loads(line) for line in (index / "bad.jsonl").read_text().splitlines()]
    assert entry["path"] == "clip" and "clip/1?.jpg: cannot be read as an image" in entry["detail"]


def test_a_picture_that_changed_in_its_folder_is_noticed(tokenizer_folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_image(tmp_path / "clip" / f"{number}.jpg", number)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"video": "clip"} | TALK]))
    index, packed = tmp_path / "index", tmp_path / "packed"
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    assert [build_index(str(rows), index, **options).reused for _ in range(2)] == [0, 1]
    assert [to_tfds(str(rows), packed, quiet=True).rows for _ in range(2)] == [1, 1]
    write_image(tmp_path / "clip" / "1.jpg", 9)
    assert build_index(str(rows), index, **options).reused == 0
    with pytest.raises(UserError, match="holds another mixture, or files that changed since"):
        to_tfds(str(rows), packed, quiet=True)


def test_a_video_of_one_frame_is_no_image(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A video would be read by the rules for videos, which may repeat its frame."""
    write_video(tmp_path / "one.mp4", seconds=1, fps=1)
    write_image(tmp_path / "clip" / "0.jpg")
    rows = [{kind: name} | TALK for name in ("one.mp4", "clip") for kind in ("image", "video")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    index = tmp_path / "index"
    report = build_index(str(tmp_path / "rows.json"), index, tokenizer=str(tokenizer_folder), quiet=True)
    assert (report.rows, report.bad) == (2, {"wrong_type": 2})
    assert "one.mp4: is a video; name it under video in its row" in (index / "bad.jsonl").read_text()


def test_a_file_with_colons_in_its_name_that_changed_is_probed_again(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    write_video(tmp_path / "a::b.mp4", seconds=1)
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "a::b.mp4"} | TALK]))
    options = {"tokenizer": str(tokenizer_folder), "quiet": True}
    reused = [build_index(str(tmp_path / "rows.json"), tmp_path / "index", **options).reused for _ in "12"]
    write_video(tmp_path / "a::b.mp4", seconds=2)
    report = build_index(str(tmp_path / "rows.json"), tmp_path / "index", **options)
    assert [*reused, report.reused] == [0, 1, 0]
    assert open_index(tmp_path / "index").columns().duration.tolist() == [2.0]


def test_the_digest_tells_what_would_change_batches(tokenizer_folder: Path, tmp_path: Path) -> None:
    """Resuming a run with an index of another digest is refused."""
    write_video(tmp_path / "a.mp4", seconds=1)
    (tmp_path / "rows.json").write_text(json.dumps([{"video": "a.mp4"} | TALK] * 2))
    mixture = tmp_path / "m.yaml"

    write_default_tokenizer(tmp_path / "other", vocab_size=400)

    def digest(weight: float = 1, tokenizer: Path = tokenizer_folder) -> str:
        mixture.write_text(f"datasets: [{{json_path: rows.json, weight: {weight}}}]")
        build_index(str(mixture), tmp_path / "index", tokenizer=str(tokenizer), quiet=True)
        return open_index(tmp_path / "index").digest

    first = digest()
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    assert digest() == first and digest(2) != first and digest(tokenizer=tmp_path / "other") != first
    write_video(tmp_path / "a.mp4", seconds=2)
    assert digest() != first


def test_a_medium_that_rows_share_is_checked_once(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, broken = "kept.mp4", "broken.mp4"
    for name in (kept, broken):
        write_video(tmp_path / name)
    rows = [{"video": broken if number >= 6 else kept} | TALK for number in range(8)]
    rows[5] |= {"start": 0.5, "end": 1}  # another part of it
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    index = tmp_path / "index"
    build_index(str(tmp_path / "rows.json"), index, tokenizer=str(tokenizer_folder), quiet=True)
    (tmp_path / broken).write_bytes(b"no video")
    opened = []

    def counted(root: str, reference: str, *options: Any, **more: Any) -> object:
        opened.append(reference)
        return open_media(root, reference, *options, **more)

    monkeypatch.setattr(check, "open_media", counted)
    found, damaged = check._check_rows(
        RowStore(open_index(str(index))), list(range(8)), sampling=SamplingConfig(frames=2),
        allow_outside=False, deadline_s=None,
    )  # fmt: skip
    assert opened == [kept, kept, broken] and damaged == []
    assert [(row.row, row.reason) for row in found] == [(6, found[0].reason), (7, found[0].reason)]
    assert "row 7" in found[1].where and broken in found[1].detail
