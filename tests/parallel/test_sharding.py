"""Shardings of batches, and rows of processes."""

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from crosslmm_jax.batch import AllOrNone
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.parallel import batch_shardings, make_mesh, row_shard, to_global
from crosslmm_jax.parallel.sharding import check_batch_size


def test_batch_shardings(tiny_config, make_batch) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    batch = make_batch(tiny_config, batch=8, frames=4)
    shardings, rows = batch_shardings(batch, mesh), ("data", "fsdp")
    assert shardings.frames.spec == PartitionSpec(rows, ("context",), None, None, None)
    assert shardings.frame_times.spec == PartitionSpec(rows, ("context",))
    for name in ("tokens", "positions", "visual_slots", "text_slots", "loss_mask"):
        assert getattr(shardings, name).spec == PartitionSpec(rows, None)
    assert shardings.visible_frames.counts.spec == PartitionSpec(rows, None)
    assert shardings.row_index.spec == PartitionSpec(rows)
    assert batch_shardings(batch._replace(frames=None), mesh).frames is None


def test_values_arrive(tiny_config, make_batch) -> None:
    mesh = make_mesh(MeshConfig(data=2, tensor=2, context=2))
    batch = make_batch(tiny_config, batch=4, frames=3)  # 3 frames cannot be sharded over 2 devices
    batch = batch._replace(visible_frames=AllOrNone(batch.visible_frames.counts))
    arrays, placed = batch.arrays(), to_global(batch, mesh)
    assert type(placed.visible_frames) is AllOrNone
    for name, value in placed.arrays().items():
        assert value.dtype == arrays[name].dtype
        assert np.array_equal(np.asarray(value), arrays[name]), name


def test_one_process_reads_all_rows() -> None:
    assert row_shard(make_mesh(MeshConfig(data=4, fsdp=2))) == (0, 1)


def test_batch_size_must_divide() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_batch_size(8, mesh, microbatches=2)
    with pytest.raises(ConfigError, match="batch_size is 12; .* of 8"):
        check_batch_size(12, mesh, microbatches=2)
