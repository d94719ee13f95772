"""A quarter of all files are damaged: nothing stops, hangs or is lost, and every fault is counted."""

import dataclasses
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from damaged import BROKEN, CUT, huge_picture, without_rate
from epochs import epoch_steps
from PIL import Image
from video_files import write_sound

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.loader import BatchIterator
from crosslmm_jax.demo.synthetic import SyntheticSet
from crosslmm_jax.errors import Fault

SIZES = [pytest.param((300, 100), id="400"), pytest.param((1000, 300), id="1300", marks=pytest.mark.nightly)]
SECONDS_EACH = 2.0  # for a damaged file


def spoil(path: Path, kind: str, rng: np.random.Generator, sound: bytes) -> frozenset[str]:
    """Damages one file; the reasons that fit, "" among them where it may be read all the same."""
    content = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(content[: int(rng.integers(1, len(content)))])
        return CUT | {"", "wrong_type", "no_video"}  # cut early, nothing tells what it was
    if kind == "flipped":
        for place in rng.integers(0, len(content), 40).tolist():
            content[place] ^= 0xFF
        path.write_bytes(content)
        return BROKEN | {""}
    if kind == "outside":
        return frozenset({"outside_root"})
    path.unlink()
    if kind == "zeros":
        path.write_bytes(bytes(len(content)))
    elif kind == "suffix":
        path.write_text("<html>not found</html>")
    elif kind == "sound":
        path.write_bytes(sound)
    elif kind == "fps0":
        path.write_bytes(without_rate(content))
    elif kind == "huge":
        path.write_bytes(huge_picture(content))
    elif kind == "fifo":
        os.mkfifo(path)
    return frozenset({KINDS[kind]})


# kind of damage -> the reason it is counted under, where there is one alone
KINDS = {
    "cut": "", "flipped": "", "zeros": "wrong_type", "suffix": "wrong_type", "sound": "no_video",
    "fps0": "zero_fps", "huge": "too_large", "outside": "outside_root", "fifo": "not_a_file",
    "missing": "missing",
}  # fmt: skip


class Damage(NamedTuple):
    """Rows that are all good when they are indexed, and those that are damaged then: row -> kind."""

    folder: Path
    kinds: dict[int, str]
    sound: bytes
    good: int


@pytest.fixture(scope="module", params=SIZES)
def damage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, synthetic: SyntheticSet
) -> Damage:
    """Rows of as many files, good ones and ones to be damaged: copies of a few videos, and pictures."""
    good, bad = request.param
    folder = tmp_path_factory.mktemp("faults")
    (folder / "v").mkdir()
    write_sound(folder / "sound.mp4")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)).save(folder / "p.png")
    sources = [path.read_bytes() for path in sorted((synthetic.folder / "videos").iterdir())]
    damaged = sorted(np.random.default_rng(0).choice(good + bad, bad, replace=False).tolist())
    kinds = {number: list(KINDS)[place % len(KINDS)] for place, number in enumerate(damaged)}
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = []
    for number in range(good + bad):
        if kinds.get(number) == "huge" or number % 20 == 0 and number not in kinds:
            name = f"v/{number:04d}.png"
            (folder / name).write_bytes((folder / "p.png").read_bytes())
            rows.append({"image": name, "conversations": turns})
            continue
        name = f"v/{number:04d}.mp4"
        (folder / name).write_bytes(sources[number % len(sources)])
        if kinds.get(number) == "outside":
            name = f"../{folder.name}/{name}"
        rows.append({"video": name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return Damage(folder, kinds, (folder / "sound.mp4").read_bytes(), good)


def workers_alive() -> set[int | None]:
    return {c.pid for c in multiprocessing.active_children() if c.name.startswith("grain-process-prefetch")}


@pytest.mark.slow
def test_an_epoch_over_damaged_files(
    damage: Damage, make_index, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = make_index(damage.folder / "rows.json", allow_outside=True)
    assert not (index / "bad.jsonl").read_text()
    rng = np.random.default_rng(0)
    allowed = {}
    for number, kind in damage.kinds.items():
        (path,) = (damage.folder / "v").glob(f"{number:04d}.*")
        allowed[number] = spoil(path, kind, rng, damage.sound)
    config = DataConfig(
        index=str(index), tokenizer=str(tokenizer_folder), batch_size=20, sampling=SamplingConfig(frames=4),
        max_bad_fraction=0.5,
    )  # fmt: skip
    runs, each = [], len(allowed) // len(KINDS)
    for workers in (2, 0):
        dataset = Dataset(dataclasses.replace(config, num_workers=workers), tokens_per_frame=1, image_size=16)
        faults: list[Fault] = []
        iterator = BatchIterator(dataset, on_bad_row=faults.append)
        batches = [next(iterator) for _ in range(2)]
        begun = workers_alive()
        batches += [next(iterator) for _ in range(epoch_steps(dataset.schedule) - 2)]
        assert len(begun) == workers and workers_alive() == begun, "no worker was lost"
        iterator.close()
        runs.append(batches)
        reasons = {row.row: row.reason for row in faults}
        assert set(reasons) <= set(allowed), "no good file is blamed"
        wrong = {
            number: (damage.kinds[number], reasons.get(number, ""))
            for number in allowed if reasons.get(number, "") not in allowed[number]
        }  # fmt: skip
        assert wrong == {}
        assert {KINDS[kind] for kind in damage.kinds.values()} - {""} <= set(iterator.faults)
        told_of = Counter(reasons.values())
        assert all(iterator.faults[reason] >= count for reason, count in told_of.items())
        assert told_of["wrong_type"] >= 2 * each and all(
            told_of[KINDS[kind]] >= each for kind in list(KINDS)[4:]
        ), "each kind is counted under its reason"
        read = Counter(int(row) for batch in batches for row in batch.row_index)
        assert set(range(damage.good + len(allowed))) - set(allowed) <= set(read)
        assert not set(reasons) & set(read)
    assert "worker process died" not in caplog.text
    for one, other in zip(*runs, strict=True):
        arrays, others = one.arrays(), other.arrays()
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name])
    assert slow_rows(dataset, allowed) == {}
    again = make_index(damage.folder / "rows.json")  # a probe finds all but what is broken deeper inside
    lines = [json.loads(line) for line in (again / "bad.jsonl").read_text().splitlines()]
    found = {line["row"]: line["reason"] for line in lines}
    assert set(found) <= set(allowed) and all(reason in allowed[row] for row, reason in found.items())
    assert {row for row, kind in damage.kinds.items() if KINDS[kind]} <= set(found)


def slow_rows(dataset: Dataset, numbers: Iterable[int]) -> dict[int, float]:
    """Seconds of the damaged rows that take longer than the limit, twice in a row."""
    slow = {}
    for number in numbers:
        bucket = dataset.buckets[dataset.bucket_numbers([number])[0]]
        for _ in range(2):
            begin = time.monotonic()
            dataset.loader.load(number, bucket)
            seconds = time.monotonic() - begin
            if seconds <= SECONDS_EACH:
                break
        else:
            slow[number] = seconds
    return slow
