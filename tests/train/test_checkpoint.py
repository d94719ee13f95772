"""Checkpoints: what is restored, on any mesh, and what happens to damaged ones and to another config."""

import contextlib
import gc
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.parallel import make_mesh
from crosslmm_jax.train.checkpoint import Checkpoints, check_disk_space, state_bytes
from crosslmm_jax.train.checksum import _on_device, array_checksums
from crosslmm_jax.train.state import TrainState

# A failed restore leaves coroutines of Orbax that warn when they are garbage-collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = {"stage": {"learning_rate": 1e-4, "steps": 9}, "run": {"out": "a", "seed": 0}, "mesh": {"data": 8}}


def make_state(step: int, mesh: jax.sharding.Mesh, spec: PartitionSpec) -> TrainState:
    """A state whose values follow from `step`; large enough that a file holds real data."""
    rng = np.random.default_rng(step)

    def array(*shape: int) -> jax.Array:
        sharding = NamedSharding(mesh, spec if len(shape) > 1 else PartitionSpec())
        return jax.device_put(rng.normal(size=shape).astype(np.float32), sharding)

    count = jax.device_put(jnp.int32(step), NamedSharding(mesh, PartitionSpec()))
    moments = ({"decoder": {"w": array(64, 256)}}, count)
    return TrainState(count, {"decoder": {"w": array(64, 256)}}, {"encoder": {"w": array(8, 16)}}, moments)


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture(scope="module", autouse=True)
def collect_here():
    """Collects them in this module; others would fail on the warnings."""
    yield
    gc.collect()


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=1, fsdp=8))


@pytest.fixture
def folder(tmp_path: Path, mesh: jax.sharding.Mesh) -> Path:
    """Checkpoints of steps 3 and 6."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, settings=CONFIG)
    for step in (3, 6):
        checkpoints.save(step, make_state(step, mesh, PartitionSpec("fsdp")), position=10 * step)
    checkpoints.close()
    return tmp_path / "checkpoints"


def restore(folder: Path, target: TrainState, settings=CONFIG) -> Any:
    checkpoints = Checkpoints(folder, keep=2, settings=settings)
    try:
        return checkpoints.restore(abstract(target))
    finally:
        checkpoints.close()


def assert_equal(left: TrainState, right: TrainState) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding


def test_newest_is_restored(folder, mesh) -> None:
    expected = make_state(6, mesh, PartitionSpec("fsdp"))
    state, position = restore(folder, expected)
    assert_equal(state, expected)
    assert position == 60


def test_onto_another_mesh(folder) -> None:
    other = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    expected = make_state(6, other, PartitionSpec("tensor", "data"))
    assert_equal(restore(folder, expected)[0], expected)


def test_nothing_saved(tmp_path, mesh) -> None:
    assert restore(tmp_path / "checkpoints", make_state(0, mesh, PartitionSpec())) is None


def test_oldest_are_removed(folder, mesh) -> None:
    checkpoints = Checkpoints(folder, keep=2, settings=CONFIG)
    checkpoints.save(9, make_state(9, mesh, PartitionSpec("fsdp")), position=90)
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["6", "9"]


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(step: Path) -> None:
    file = largest_file(step)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bits(step: Path) -> None:
    """Flips one bit in the middle of the largest file, which Orbax reads without complaint."""
    file = largest_file(step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


def remove_item(step: Path) -> None:
    shutil.rmtree(step / "data")


@pytest.mark.parametrize("damage", [truncate, flip_bits, remove_item])
def test_damaged_newest_is_reported_and_the_one_before_used(folder, mesh, caplog, damage) -> None:
    damage(folder / "6")
    expected = make_state(3, mesh, PartitionSpec("fsdp"))
    state, position = restore(folder, expected)
    assert_equal(state, expected)
    assert position == 30
    assert f"{folder}/6 is damaged" in caplog.text
    assert (folder.parent / "checkpoints_damaged" / "6").is_dir(), "it is kept for inspection"
    checkpoints = Checkpoints(folder, keep=2, settings=CONFIG)
    checkpoints.save(6, make_state(6, mesh, PartitionSpec("fsdp")), position=60)
    checkpoints.close()
    assert restore(folder, expected)[1] == 60


def test_damaged_twice_at_one_step(folder, mesh) -> None:
    """The checkpoint that was moved aside first stays, too."""
    expected = make_state(3, mesh, PartitionSpec("fsdp"))
    for position in (1, 2):
        truncate(folder / "6")
        restore(folder, expected)
        checkpoints = Checkpoints(folder, keep=2, settings=CONFIG)
        checkpoints.save(6, make_state(6, mesh, PartitionSpec("fsdp")), position=position)
        checkpoints.close()
    aside = folder.parent / "checkpoints_damaged"
    assert sorted(path.name for path in aside.iterdir()) == ["6", "6.1"]
    assert all((path / "data").is_dir() for path in aside.iterdir())


def test_damaged_that_cannot_be_moved(folder, mesh) -> None:
    truncate(folder / "6")
    (folder.parent / "checkpoints_damaged").touch()
    with pytest.raises(UserError, match=r"/6: damaged, and cannot be moved to .*move it away"):
        restore(folder, make_state(3, mesh, PartitionSpec()))


def test_all_damaged(folder, mesh) -> None:
    truncate(folder / "3")
    truncate(folder / "6")
    with pytest.raises(UserError, match=r"all checkpoints \[6, 3\] are damaged"):
        restore(folder, make_state(3, mesh, PartitionSpec()))
    assert sorted(path.name for path in folder.iterdir()) == ["3", "6"]


def test_half_written_checkpoint_is_not_seen(folder, mesh) -> None:
    shutil.copytree(folder / "6", folder / "9.orbax-checkpoint-tmp-1")
    assert restore(folder, make_state(6, mesh, PartitionSpec()))[1] == 60


def test_another_config_is_refused(folder, mesh) -> None:
    changed = CONFIG | {"stage": {"learning_rate": 2e-4, "steps": 9}}
    with pytest.raises(ConfigError, match=r"stage\.learning_rate was 0\.0001 and is 0\.0002"):
        restore(folder, make_state(6, mesh, PartitionSpec()), settings=changed)


def test_state_may_change_while_it_is_written(tmp_path) -> None:
    """The buffers of a donated state are reused at once."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = make_state(0, mesh, PartitionSpec())
    state = state._replace(frozen={"encoder": {"w": jnp.ones((512, 1024))}}, opt_state=())
    before = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, settings=CONFIG)
    checkpoints.save(1, state, position=1)
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    for _ in range(20):
        state = add(state)
    jax.block_until_ready(state)
    checkpoints.close()
    restored, _ = restore(tmp_path / "checkpoints", state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ending", ["wait", "close", "save"])
def test_disk_that_fills_while_a_checkpoint_is_written(folder, mesh, ending) -> None:
    checkpoints = Checkpoints(folder, keep=2, settings=CONFIG)
    endings = {
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "save": lambda: checkpoints.save(12, make_state(12, mesh, PartitionSpec()), position=120),
    }
    with (
        large_files_refused(),
        pytest.raises(UserError, match=r"checkpoint was not written \(File too large"),
    ):
        checkpoints.save(9, make_state(9, mesh, PartitionSpec("fsdp")), position=90)
        endings[ending]()
    assert restore(folder, make_state(6, mesh, PartitionSpec()))[1] == 60


@contextlib.contextmanager
def large_files_refused() -> Iterator[None]:
    """Like a full disk, but only for files as large as those of a state."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_too_little_disk_space(tmp_path, monkeypatch) -> None:
    check_disk_space(tmp_path / "new", 10**6)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5 * 10**6, 5 * 10**6))
    with pytest.raises(UserError, match=r"0\.005 GB are free; .* need 2\.000 GB"):
        check_disk_space(tmp_path / "new", 2 * 10**9)


def test_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"run\.out .*file/run: .*can be written"):
        check_disk_space(tmp_path / "file" / "run", 1)


def test_state_bytes(mesh) -> None:
    assert state_bytes(make_state(0, mesh, PartitionSpec())) == 4 * (2 * 64 * 256 + 8 * 16 + 2)


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 8)])
def test_checksums_are_the_same_on_host_and_devices(shape, dtype, mesh) -> None:
    value = np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))
    spec = PartitionSpec(None, None, "fsdp") if len(shape) == 3 else PartitionSpec()
    array = jax.device_put(value, NamedSharding(mesh, spec))
    (host,) = array_checksums([array]).values()
    assert host == int(_on_device([array])[0])
    changed = value.copy()
    changed.reshape(-1).view(np.uint8)[0] ^= 1
    assert array_checksums([jnp.asarray(changed)]) != array_checksums([jnp.asarray(value)])


def test_checksum_sees_swapped_elements() -> None:
    assert array_checksums([jnp.array([1.0, 2.0])]) != array_checksums([jnp.array([2.0, 1.0])])
