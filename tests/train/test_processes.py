"""Agreement between processes: the same settings, and one checkpoint that all can read."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.parallel import FailedSomewhere, succeed_on_all
from crosslmm_jax.train.settings import check_same_settings

SETTINGS = {"data": {"index": "a", "batch_size": 8}, "run": {"seed": 0}, "index_digest": "12ab"}


def test_processes_must_have_the_same_rows_and_config() -> None:
    elsewhere = SETTINGS | {"data": {"index": "b", "batch_size": 8}}
    check_same_settings([SETTINGS])
    check_same_settings([SETTINGS, elsewhere, SETTINGS])
    changed = elsewhere | {"index_digest": "34cd", "run": {"seed": 1}}
    with pytest.raises(ConfigError) as error:
        check_same_settings([SETTINGS, elsewhere, changed])
    message = str(error.value)
    assert "index_digest is '12ab' on process 0 and '34cd' on process 2" in message
    assert "run.seed is 0 on process 0 and 1 on process 2" in message
    assert "data.index is" not in message and "process 1" not in message


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("truncated"), FailedSomewhere),
        (UserError("another config"), UserError),
        (MemoryError(), MemoryError),
        (RuntimeError("RESOURCE_EXHAUSTED: device"), RuntimeError),
    ],
)
def test_what_ends_a_run_and_what_does_not(raised: Exception, expected: type[Exception]) -> None:
    def fail() -> None:
        raise raised

    assert succeed_on_all(lambda: 3) == 3
    with pytest.raises(expected) as error:
        succeed_on_all(fail)
    assert str(raised) in str(error.value)


# Each process damages or checks something; sys.argv[1] is an empty folder.
TWO_PROCESSES = """
    import os, sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec
    from crosslmm_jax.config import MeshConfig
    from crosslmm_jax.errors import ConfigError, UserError
    from crosslmm_jax.parallel import gather, initialize_processes, make_mesh
    from crosslmm_jax.train.checkpoint import Checkpoints
    from crosslmm_jax.train.state import TrainState
    initialize_processes()
    here, folder = jax.process_index(), Path(sys.argv[1]) / "checkpoints"
    assert gather({"x": "ab" * here}) == [{"x": ""}, {"x": "ab"}]

    mesh = make_mesh(MeshConfig(data=1, fsdp=2))
    sharded, replicated = (NamedSharding(mesh, spec) for spec in (PartitionSpec("fsdp"), PartitionSpec()))
    shardings = TrainState(replicated, {"w": sharded}, {}, {})

    @jax.jit
    def make(step):
        state = TrainState(step, {"w": jax.random.normal(jax.random.key(step), (64, 512))}, {}, {})
        return jax.lax.with_sharding_constraint(state, shardings)

    def restored(settings):
        checkpoints = Checkpoints(folder, keep=3, settings=settings)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), make(1), shardings
        )
        try:
            return checkpoints.restore(abstract)
        finally:
            checkpoints.close()

    checkpoints = Checkpoints(folder, keep=3, settings={"x": 1})
    for step in (1, 2, 3):
        checkpoints.save(step, make(step), position=10 * step)
    checkpoints.close()
    if here == 1:  # process 0 can still read all of its shards
        files = (folder / "3" / "state" / "ocdbt.process_1" / "d").iterdir()
        os.truncate(max(files, key=lambda file: file.stat().st_size), 1000)
    multihost_utils.sync_global_devices("damaged")
    try:
        restored({"x": 1 if here == 0 else 2})
    except UserError as error:
        assert isinstance(error, ConfigError) == (here == 1), error
        assert here == 1 or "process 1 ended this run: ConfigError: " in str(error)
    else:
        raise AssertionError("process 1 has another config")
    state, position = restored({"x": 1})
    assert (int(state.step), position) == (2, 20)
    expected = make(2).trainable["w"].addressable_data(0)
    assert jnp.array_equal(state.trainable["w"].addressable_data(0), expected)
"""


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_skip_what_one_cannot_read(tmp_path: Path, free_port) -> None:
    """Both end when one of them refuses the checkpoint."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TWO_PROCESSES), str(tmp_path)],
            env=os.environ | {
                "COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(index),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    for output in outputs:
        assert f"checkpoint {tmp_path}/checkpoints/3 is damaged: process 1: " in output
    assert [path.name for path in (tmp_path / "checkpoints_damaged").iterdir()] == ["3"]
