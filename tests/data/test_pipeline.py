"""The same batches for any number of workers and hosts, resume from one integer, stand-ins for bad files."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.clip import Clip
from crosslmm_jax.data.collate import Batch
from crosslmm_jax.data.loader import BadRow, FrameCache
from crosslmm_jax.data.pipeline import BatchIterator, Source, make_iterator
from crosslmm_jax.data.synthetic import SyntheticSet
from crosslmm_jax.errors import ConfigError, UserError


@pytest.fixture
def config(synthetic: SyntheticSet, tokenizer_folder: Path) -> DataConfig:
    return DataConfig(
        annotations=(str(synthetic.train),), media_root=str(synthetic.folder),
        tokenizer=str(tokenizer_folder), batch_size=24, text_buckets=(64,),
        sampling=SamplingConfig(frames=4), frame_cache_mb=8,
    )  # fmt: skip


def source_of(config: DataConfig) -> Source:
    return Source(config, tokens_per_frame=1, image_size=32)


def take(iterator: BatchIterator, count: int) -> list[Batch]:
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
            assert one[name].dtype == other[name].dtype


def test_workers_do_not_change_batches_and_one_integer_resumes(config: DataConfig) -> None:
    source = source_of(config)
    expected = take(make_iterator(source), 8)
    with_workers = make_iterator(source_of(dataclasses.replace(config, num_workers=2)))
    first = [next(with_workers) for _ in range(5)]
    state = json.loads(json.dumps(with_workers.get_state()))
    with_workers.close()
    assert state == {"global_next_index": 5 * 24}
    resumed = make_iterator(source)
    next(resumed)
    resumed.set_state(state)
    assert_same(expected, first + take(resumed, 3))
    assert_same(expected[3:5], take(make_iterator(source, global_next_index=3 * 24), 2))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_batch(config: DataConfig, hosts: int) -> None:
    source = source_of(config)
    shards = [
        take(make_iterator(source, global_next_index=24, shard_index=index, shard_count=hosts), 2)
        for index in range(hosts)
    ]
    joined = [
        {name: np.concatenate([shard[step][name] for shard in shards]) for name in shards[0][0]}
        for step in range(2)
    ]
    assert_same(take(make_iterator(source, global_next_index=24), 2), joined)


def test_each_epoch_visits_every_row_once_in_a_new_order(config: DataConfig) -> None:
    config = dataclasses.replace(config, batch_size=16)  # 64 rows
    rows = [batch["row_index"] for batch in take(make_iterator(source_of(config)), 8)]
    epochs = np.concatenate(rows[:4]).tolist(), np.concatenate(rows[4:]).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64))
    assert epochs[0] != epochs[1] and epochs[0] != list(range(64))
    other_seed = take(make_iterator(source_of(dataclasses.replace(config, seed=1))), 1)
    assert other_seed[0]["row_index"].tolist() != rows[0].tolist()
    in_order = take(make_iterator(source_of(dataclasses.replace(config, shuffle=False))), 1)
    assert in_order[0]["row_index"].tolist() == list(range(16))


def test_batches_show_the_rows_they_name(config: DataConfig) -> None:
    source = source_of(config)
    batch = take(make_iterator(source), 1)[0]
    for index, number in enumerate(batch["row_index"]):
        row = source.rows[number]
        real = batch["tokens"][index][batch["loss_mask"][index] > 0]
        assert source.tokenizer.decode(real) == row.turns[1].text
        assert row.turns[0].text.removeprefix("<image>\n") in source.tokenizer.decode(batch["tokens"][index])
        clip = source.loader._clip(row.media[0], None)
        np.testing.assert_array_equal(batch["frames"][index], clip.frames)
        np.testing.assert_array_equal(batch["frame_times"][index], clip.times)


def test_plain_style_and_captions(config: DataConfig, synthetic: SyntheticSet) -> None:
    plain = dataclasses.replace(config, annotations=(str(synthetic.captions),), style="plain", batch_size=8)
    source = source_of(plain)
    batch = take(make_iterator(source), 1)[0]
    assert (batch["visual_slots"] == np.arange(4)).all()
    text = source.tokenizer.decode(batch["tokens"][0][batch["loss_mask"][0] > 0])
    assert text == source.rows[batch["row_index"][0]].turns[1].text + "\n"


def damaged(config: DataConfig, tmp_path: Path, names: list[str]) -> DataConfig:
    root = tmp_path / "copy"
    shutil.copytree(config.media_root, root)
    for name in names:
        (root / name).write_text("no video")
    return dataclasses.replace(config, media_root=str(root), annotations=(str(root / "train.json"),))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_replaced_the_same_way_each_time(
    config: DataConfig, tmp_path: Path, workers: int
) -> None:
    bad_videos = ["videos/train_00002.mp4", "videos/train_00009.mp4"]
    config = damaged(dataclasses.replace(config, batch_size=16, num_workers=workers), tmp_path, bad_videos)
    source = source_of(config)
    told: list[BadRow] = []
    iterator = make_iterator(source, on_bad_row=told.append)
    first = take(iterator, 4)
    bad_rows = {row.index for row in source.rows if row.media[0].endswith(tuple(bad_videos))}
    assert len(bad_rows) == 8
    seen = Counter(int(row) for batch in first for row in batch["row_index"])
    assert not bad_rows & set(seen) and sum(seen.values()) == 64
    assert set(iterator.bad_rows) == bad_rows == {row.row_index for row in told}
    assert len(told) == 8  # each row is told once
    assert "cannot be decoded" in told[0].reason and "train.json: row" in told[0].reason
    clean = source_of(dataclasses.replace(config, num_workers=0))
    assert_same(first, take(make_iterator(clean, on_bad_row=told.append), 4))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_stops_with_one_line(config: DataConfig, tmp_path: Path, workers: int) -> None:
    (tmp_path / "elsewhere").mkdir()
    wrong = dataclasses.replace(config, media_root=str(tmp_path / "elsewhere"), num_workers=workers)
    iterator = make_iterator(source_of(wrong), on_bad_row=[].append)
    with pytest.raises(UserError, match="no such file.*check media_root") as caught:
        next(iterator)
    iterator.close()
    assert "\n" not in str(caught.value)


def test_batch_of_given_rows(config: DataConfig, tmp_path: Path) -> None:
    config = damaged(config, tmp_path, ["videos/train_00001.mp4"])
    source = source_of(config)
    batch = source.batch([3, 0, 3])
    assert batch["row_index"].tolist() == [3, 0, 3]
    np.testing.assert_array_equal(batch["frames"][0], batch["frames"][2])
    with pytest.raises(UserError, match="row 4 .*cannot be decoded"):
        source.batch([0, 4])


def test_row_too_long_is_named(config: DataConfig) -> None:
    iterator = make_iterator(source_of(dataclasses.replace(config, text_buckets=(8, 16))))
    with pytest.raises(
        UserError, match=r"train.json: row \d+ \(id .*\): has 3\d text tokens, more than text_b"
    ):
        next(iterator)
    iterator.close()


def test_several_hosts_need_one_shape(config: DataConfig) -> None:
    for change in ({"text_buckets": (32, 64)}, {"frame_buckets": (4, 8)}):
        source = source_of(dataclasses.replace(config, **change))
        with pytest.raises(ConfigError, match=f"DataConfig.{next(iter(change))} .* must hold one size"):
            make_iterator(source, shard_count=2)
    with pytest.raises(ConfigError, match="batch_size is 24; it must be a multiple of the 5 hosts"):
        make_iterator(source_of(config), shard_count=5)


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
    cached = take(make_iterator(source_of(config)), 7)
    fresh = take(make_iterator(source_of(dataclasses.replace(config, frame_cache_mb=0))), 7)
    assert_same(cached, fresh)
