"""The same batches for any number of workers and hosts, resume from one integer, stand-ins for bad files."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from dying_loader import DyingLoader
from epochs import epoch_steps

from crosslmm_jax.batch import Batch
from crosslmm_jax.config import DataConfig, ModalityWeights, SamplingConfig
from crosslmm_jax.data.batching.buckets import Bucket
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.example import Example, FrameCache
from crosslmm_jax.data.loading.loader import BatchIterator
from crosslmm_jax.data.media.image import Clip
from crosslmm_jax.data.reports.check import check_index
from crosslmm_jax.demo.synthetic import SyntheticSet
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import ConfigError, Fault, UserError


@pytest.fixture
def config(synthetic: SyntheticSet, tokenizer_folder: Path, make_index) -> DataConfig:
    return DataConfig(
        index=str(make_index(synthetic.train)), tokenizer=str(tokenizer_folder), batch_size=24,
        text_buckets=(64,), frame_buckets=(4,),
        sampling=SamplingConfig(frames=4), frame_cache_mb=8,
    )  # fmt: skip


def dataset_of(config: DataConfig) -> Dataset:
    return Dataset(config, tokens_per_frame=1, image_size=32)


def take(iterator: BatchIterator, count: int) -> list[Batch]:
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        arrays, others = one.arrays(), other.arrays()
        assert arrays.keys() == others.keys() and type(one.visible_frames) is type(other.visible_frames)
        for name in arrays:
            np.testing.assert_array_equal(arrays[name], others[name], err_msg=name)
            assert arrays[name].dtype == others[name].dtype


@pytest.mark.slow
def test_workers_do_not_change_batches_and_one_integer_resumes(config: DataConfig) -> None:
    dataset = dataset_of(config)
    expected = take(BatchIterator(dataset), 8)
    with_workers = BatchIterator(dataset_of(dataclasses.replace(config, num_workers=2)))
    first = [next(with_workers) for _ in range(5)]
    state = json.loads(json.dumps(with_workers.get_state()))
    with_workers.close()
    assert state == {"global_next_index": 5 * 24}
    resumed = BatchIterator(dataset)
    next(resumed)
    resumed.set_state(state)
    assert_same(expected, first + take(resumed, 3))
    assert_same(expected[3:5], take(BatchIterator(dataset, global_next_index=3 * 24), 2))


def test_all_cores_make_the_first_batch_before_others_begin(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(config)
    first = sorted(dataset.scheduled(0).rows.tolist())
    all_at_once = threading.Barrier(len(first), timeout=60)
    begun: list[int] = []
    load = dataset.loader.load_or_replace

    def meet(row: int, *others: Any) -> tuple[Example, list[Fault]]:
        begun.append(row)
        if len(begun) <= len(first):
            all_at_once.wait()  # raises unless each row of the batch has a thread
        return load(row, *others)

    monkeypatch.setattr(dataset.loader, "load_or_replace", meet)
    monkeypatch.setattr("os.cpu_count", lambda: len(first))
    take(BatchIterator(dataset), 2)
    assert sorted(begun[: len(first)]) == first and len(begun) >= 2 * len(first)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_batch(config: DataConfig, hosts: int) -> None:
    dataset = dataset_of(config)
    shards = [
        take(BatchIterator(dataset, global_next_index=24, shard_index=index, shard_count=hosts), 2)
        for index in range(hosts)
    ]
    joined = [
        jax.tree.map(lambda *parts: np.concatenate(parts), *(shard[step] for shard in shards))
        for step in range(2)
    ]
    assert_same(take(BatchIterator(dataset, global_next_index=24), 2), joined)


def test_each_epoch_visits_every_row_once_in_a_new_order(config: DataConfig) -> None:
    config = dataclasses.replace(config, batch_size=16)  # 64 rows
    rows = [batch.row_index for batch in take(BatchIterator(dataset_of(config)), 8)]
    epochs = np.concatenate(rows[:4]).tolist(), np.concatenate(rows[4:]).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(64))
    other_seed = take(BatchIterator(dataset_of(dataclasses.replace(config, seed=1))), 1)
    assert other_seed[0].row_index.tolist() != rows[0].tolist()
    in_order = take(BatchIterator(dataset_of(dataclasses.replace(config, shuffle=False))), 1)
    assert in_order[0].row_index.tolist() == list(range(16))


def test_batches_show_the_rows_they_name(config: DataConfig) -> None:
    dataset = dataset_of(config)
    batch = take(BatchIterator(dataset), 1)[0]
    for index, number in enumerate(batch.row_index):
        row = dataset.rows[int(number)]
        real = batch.tokens[index][batch.loss_mask[index] > 0]
        assert dataset.tokenizer.decode(real) == row.turns[1].text
        assert row.turns[0].text.removeprefix("<image>\n") in dataset.tokenizer.decode(batch.tokens[index])
        clip = dataset.loader._read_clip(row, row.media[0], None)
        np.testing.assert_array_equal(batch.frames[index], clip.frames)
        np.testing.assert_array_equal(batch.frame_times[index], clip.times)


def test_plain_style_and_captions(config: DataConfig, synthetic: SyntheticSet, make_index) -> None:
    index = str(make_index(synthetic.captions))
    plain = dataclasses.replace(config, index=index, style="plain", batch_size=8)
    dataset = dataset_of(plain)
    batch = take(BatchIterator(dataset), 1)[0]
    assert (batch.visual_slots == np.arange(4)).all()
    text = dataset.tokenizer.decode(batch.tokens[0][batch.loss_mask[0] > 0])
    assert text == dataset.rows[int(batch.row_index[0])].turns[1].text + "\n"


@pytest.fixture
def damage(config: DataConfig, synthetic: SyntheticSet, tmp_path: Path, make_index):
    """`damage(names)`: the same rows in a copy whose files `names` were spoilt after indexing."""

    def spoil(names: list[str]) -> DataConfig:
        root = tmp_path / "copy"
        shutil.copytree(synthetic.folder, root)
        index = str(make_index(root / "train.json"))
        for name in names:
            (root / name).write_text("no video")
        return dataclasses.replace(config, index=index, max_bad_fraction=0.5)

    return spoil


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_replaced_the_same_way_each_time(config: DataConfig, damage, workers: int) -> None:
    bad_videos = ["videos/train_00002.mp4", "videos/train_00009.mp4"]
    config = dataclasses.replace(damage(bad_videos), batch_size=16, num_workers=workers)
    dataset = dataset_of(config)
    faults: list[Fault] = []
    iterator = BatchIterator(dataset, on_bad_row=faults.append)
    first = take(iterator, 4)
    bad_rows = {number for number in range(64) if dataset.rows[number].media[0] in bad_videos}
    assert len(bad_rows) == 8
    seen = Counter(int(row) for batch in first for row in batch.row_index)
    assert not bad_rows & set(seen) and sum(seen.values()) == 64
    assert set(iterator.bad_rows) == bad_rows == {row.row for row in faults}
    assert len(faults) == 8  # each row is faults once
    assert sum(iterator.faults.values()) >= 8 and iterator.take_counts()["faults"] == iterator.faults
    assert not iterator.take_counts()["faults"]
    assert "cannot be decoded" in faults[0].detail and "train.json: row" in faults[0].where
    clean = dataset_of(dataclasses.replace(config, num_workers=0))
    assert_same(first, take(BatchIterator(clean, on_bad_row=faults.append), 4))


def test_too_many_bad_files_stop_with_the_list(config: DataConfig, damage) -> None:
    spoilt = damage([f"videos/train_{number:05d}.mp4" for number in (1, 5)])
    iterator = BatchIterator(
        dataset_of(dataclasses.replace(spoilt, max_bad_fraction=0.1)), on_bad_row=[].append
    )
    steps = 0
    with pytest.raises(UserError, match=r"rows could not be read \(\d+ wrong_type\), ") as error:
        for _ in range(30):
            next(iterator)
            steps += 1
    iterator.close()
    named = re.search(r"max_bad_fraction 0\.1; repair .* raise it to (\S+) or more", str(error.value))
    assert named and float(named[1]) > 0.1
    raised = dataset_of(dataclasses.replace(spoilt, max_bad_fraction=float(named[1])))
    take(BatchIterator(raised, on_bad_row=[].append), steps + 1)
    assert "train_00001.mp4" in str(error.value) or "train_00005.mp4" in str(error.value)
    patient = BatchIterator(dataset_of(spoilt), on_bad_row=[].append)
    take(patient, 30)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_stops_with_one_line(config: DataConfig, damage, workers: int) -> None:
    spoilt = dataclasses.replace(damage([]), num_workers=workers, frame_cache_mb=0)
    iterator = BatchIterator(dataset_of(spoilt), on_bad_row=[].append)
    if workers:
        next(iterator)  # the first batch is made here, the error shall come from a worker
    shutil.rmtree(iterator.dataset.rows[0].root + "/videos")
    with pytest.raises(UserError, match="no such file.*are the media where the index") as caught:
        for _ in range(50):
            next(iterator)
    iterator.close()
    assert "\n" not in str(caught.value)


def workers_alive() -> set[int]:
    """Process ids of grain's workers."""
    found = multiprocessing.active_children()
    return {int(one.pid or 0) for one in found if one.name.startswith("grain-process-prefetch")}


def ignores(process: int, number: int) -> bool:
    """Whether a process ignores a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_a_killed_worker_is_replaced(config: DataConfig) -> None:
    """Its batches come from a new one, the same ones."""
    dataset = dataset_of(dataclasses.replace(config, num_workers=2, prefetch=2))
    iterator = BatchIterator(dataset)
    batches = [next(iterator)]
    deadline = time.monotonic() + 60
    while len(workers := workers_alive()) < 2:  # they start though nobody asks for the second batch yet
        assert time.monotonic() < deadline
        time.sleep(0.05)
    batches.append(next(iterator))
    for worker in workers:
        assert ignores(worker, signal.SIGINT), "Ctrl-C reaches it too, and only the parent acts on it"
        os.kill(worker, signal.SIGKILL)
    batches += [next(iterator) for _ in range(5)]
    iterator.close()
    assert_same(batches, take(BatchIterator(dataset_of(config)), 7))


@pytest.mark.slow
def test_workers_that_always_die_end_the_run(config: DataConfig) -> None:
    dataset = dataset_of(dataclasses.replace(config, num_workers=1))
    dataset.loader = DyingLoader(dataset.rows, config, tokenizer=dataset.tokenizer, image_size=32)
    iterator = BatchIterator(dataset)
    with pytest.raises(
        UserError, match="worker processes died 4 times in a row at step 1, .*lower DataConfig.num_workers"
    ):
        for _ in range(2):
            next(iterator)
    iterator.close()


def test_readers_are_imported_before_threads_start(config: DataConfig) -> None:
    """While one thread imports TensorFlow Datasets, another that imports PyAV would get broken modules."""
    program = """
import pickle, sys
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.loader import _BatchLoader
config = pickle.loads(bytes.fromhex(sys.argv[1]))
dataset = Dataset(config, tokens_per_frame=1, image_size=32)
assert "av" not in sys.modules
made = _BatchLoader(dataset, start=0, shard_index=0, shard_count=1, num_threads=1)
assert {"av", "av.video.reformatter", "PIL.ImageOps", "PIL.WebPImagePlugin"} <= set(sys.modules)
state = made.__getstate__()
for name in [name for name in sys.modules if name.split(".")[0] in ("av", "PIL")]:
    del sys.modules[name]
_BatchLoader.__new__(_BatchLoader).__setstate__(state)  # as a worker process does
assert {"av", "av.video.reformatter", "PIL.ImageOps", "PIL.WebPImagePlugin"} <= set(sys.modules)
"""
    words = [sys.executable, "-c", program, pickle.dumps(config).hex()]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_batch_of_given_rows(damage) -> None:
    dataset = dataset_of(damage(["videos/train_00001.mp4"]))
    batch = dataset.batch([3, 0, 3])
    assert batch.row_index.tolist() == [3, 0, 3]
    np.testing.assert_array_equal(batch.frames[0], batch.frames[2])
    with pytest.raises(UserError, match="row 4 .*cannot be decoded"):
        dataset.batch([0, 4])


@pytest.mark.parametrize(
    ("limits", "fix"),
    [
        ({"text_buckets": (8, 16)}, r"raise the largest of (text_buckets) from 16 to (\d+) or more$"),
        ({"max_text_tokens": 5}, r"raise (max_text_tokens) from 5 to (\d+) or more$"),
        (
            {"frame_buckets": (1,)},
            r"raise the largest of (frame_buckets) from 1 to (\d+) or more, or read few",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_smallest_settings_that_fit_are_named(config: DataConfig, limits: dict, fix: str) -> None:
    empty = {"text_buckets": (), "frame_buckets": ()}
    with pytest.raises(ConfigError, match=r"none of the 64 rows of .* fits: up to the first answer") as error:
        dataset_of(dataclasses.replace(config, **(empty | limits)))
    message = str(error.value)
    lengths = re.search(
        r"they have (\d+)(?: to (\d+))? text tokens, and (\d+)(?: to (\d+))? frames; ", message
    )
    found = re.search(fix, message)
    assert lengths and found, message
    field, least = found[1], int(found[2])
    assert str(least) == lengths[3 if field == "frame_buckets" else 1]

    def with_limit(value: int) -> DataConfig:
        return dataclasses.replace(config, **(empty | {field: value if "max" in field else (value,)}))

    assert dataset_of(with_limit(least)).buckets
    with pytest.raises(ConfigError, match="none of the 64 rows"):
        dataset_of(with_limit(least - 1))


def test_rows_of_other_modalities_or_styles(config: DataConfig, synthetic: SyntheticSet, make_index) -> None:
    text = dataclasses.replace(config, modality_weights=ModalityWeights(text=1.0))
    with pytest.raises(
        ConfigError, match="fits: they are video, and modality_weights gives steps to text only"
    ):
        dataset_of(text)
    with pytest.raises(ConfigError, match="fits: none is of style 'plain'; set style to 'chat'"):
        dialogues = str(make_index(synthetic.dialogues))
        dataset_of(dataclasses.replace(config, index=dialogues, style="plain"))


def test_rows_that_are_too_long_are_cut_by_whole_turns_and_counted(
    config: DataConfig, synthetic: SyntheticSet, tmp_path: Path, make_index
) -> None:
    lines = [f"  - {{json_path: {path}}}" for path in (synthetic.train, synthetic.dialogues)]
    (tmp_path / "mixture.yaml").write_text("\n".join(["datasets:", *lines]))
    both = dataclasses.replace(config, index=str(make_index(tmp_path / "mixture.yaml")), batch_size=4)
    shorter = dataset_of(both)
    assert shorter.num_without_bucket == 0
    iterator = BatchIterator(shorter)
    batches = take(iterator, epoch_steps(shorter.schedule))
    turns = iterator.truncated["turns"]
    assert iterator.truncated["rows"] == 16 and 16 * 2 <= turns < 16 * 8 and turns % 2 == 0
    assert not iterator.faults and {batch.text_slots.shape[1] for batch in batches} == {64}
    assert iterator.take_counts()["truncated"] == {"rows": 16, "turns": turns}
    assert iterator.take_counts() == {"faults": {}, "truncated": {"rows": 0, "turns": 0}}
    every = dataset_of(dataclasses.replace(both, text_buckets=(), frame_buckets=()))
    assert every.num_without_bucket == 0 and [bucket.frames for bucket in every.buckets] == [4, 4]
    seen = {int(row) for step in range(epoch_steps(every.schedule)) for row in every.scheduled(step).rows}
    assert seen == set(range(80))


def test_rows_that_fit_no_bucket_are_left_out(
    config: DataConfig, synthetic: SyntheticSet, tmp_path: Path, make_index, caplog: pytest.LogCaptureFixture
) -> None:
    rows = json.loads(synthetic.train.read_text())
    rows[3]["conversations"][0]["value"] += " Look closely." * 30  # its first exchange alone is too long
    (synthetic.folder / "long.json").write_text(json.dumps(rows))
    dataset = dataset_of(dataclasses.replace(config, index=str(make_index(synthetic.folder / "long.json"))))
    assert dataset.num_without_bucket == 1 and "1 of 64 rows are never read" in caplog.text
    found = dataset.loader.load(3, dataset.buckets[0])
    assert isinstance(found, Fault) and found.reason == "too_long" and "row 3 " in found.where


@pytest.mark.parametrize("step", ["tokenise", "open_media"])
def test_any_user_error_makes_a_bad_row(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UserError("a.bin: is odd; replace it")

    dataset = dataset_of(config)
    monkeypatch.setattr(f"crosslmm_jax.data.loading.example.{step}", refuse)
    found = dataset.loader.load(0, Bucket("video", 4, 64))
    assert isinstance(found, Fault) and (found.row, found.reason) == (0, "other")
    assert "a.bin: is odd; replace it" in found.detail


def test_steps_of_a_modality_without_rows_go_to_the_others(
    config: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = dataset_of(dataclasses.replace(config, modality_weights=ModalityWeights(image=1.0, video=1.0)))
    assert dataset.scheduled(0).bucket.modality == dataset.scheduled(1).bucket.modality == "video"
    assert "DataConfig.modality_weights gives steps to image, but no row is one" in caplog.text


def test_paths_out_of_the_root_only_when_the_config_allows(
    config: DataConfig, synthetic: SyntheticSet, tmp_path: Path, make_index
) -> None:
    rows = json.loads(synthetic.train.read_text())
    for row in rows:
        row["video"] = f"../{synthetic.folder.name}/{row['video']}"
    (synthetic.folder / "up.json").write_text(json.dumps(rows))
    index = make_index(synthetic.folder / "up.json", allow_outside=True)
    allowed = dataclasses.replace(config, index=str(index), allow_outside=True)
    expected = take(BatchIterator(dataset_of(config)), 1)
    assert_same(expected, take(BatchIterator(dataset_of(allowed)), 1))
    found = dataset_of(dataclasses.replace(allowed, allow_outside=False)).loader.load(
        0, Bucket("video", 4, 64)
    )
    assert isinstance(found, Fault) and found.reason == "outside_root"
    assert check_index(str(index), sampling=config.sampling, quiet=True, allow_outside=True) == (64, [])
    count, bad = check_index(str(index), sampling=config.sampling, quiet=True)
    assert count == 64 and {row.reason for row in bad} == {"outside_root"} and len(bad) == 64


def test_a_batch_must_divide_among_hosts_and_a_position_be_its_begin(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match="batch_size is 24; it must be a multiple of the 5 hosts"):
        BatchIterator(dataset_of(config), shard_count=5)
    with pytest.raises(ConfigError, match="no batch of this size begins at position 25"):
        BatchIterator(dataset_of(config), global_next_index=25)


def test_an_index_of_another_tokenizer_is_refused(config: DataConfig, tmp_path: Path) -> None:
    write_default_tokenizer(tmp_path / "other", vocab_size=400)
    with pytest.raises(ConfigError, match="made with a tokenizer other than .*other; run"):
        dataset_of(dataclasses.replace(config, tokenizer=str(tmp_path / "other")))


def test_frame_cache_is_bounded() -> None:
    def clip() -> Clip:
        return Clip(np.zeros((1, 10, 10, 3), np.uint8), np.zeros(1, np.float32), 0.0)

    cache = FrameCache(700)
    for name in "abc":
        cache.put(name, clip())
        cache.put(name, clip())
    assert cache.get("a") is not None and cache.get("b") is not None and cache.get("c") is None
    assert cache.used == 600


def test_cached_frames_are_those_of_a_fresh_decode(config: DataConfig) -> None:
    cached = take(BatchIterator(dataset_of(config)), 7)
    fresh = take(BatchIterator(dataset_of(dataclasses.replace(config, frame_cache_mb=0))), 7)
    assert_same(cached, fresh)
