"""The mesh from its config, and the start of processes from the environment."""

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.parallel import initialize_processes, make_mesh, mesh_sizes
from crosslmm_jax.parallel.mesh import MESH_AXES, _over_slices


def test_axes_and_fill() -> None:
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_any_axis_may_fill() -> None:
    assert make_mesh(MeshConfig(data=2, context=-1)).shape["context"] == 4


def test_some_devices() -> None:
    assert make_mesh(MeshConfig(data=-1), jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(data=-1, tensor=3), MeshConfig(data=2), MeshConfig(fsdp=16)]
)
def test_sizes_that_do_not_fit(config: MeshConfig) -> None:
    with pytest.raises(ConfigError, match=r"MeshConfig data=.*8 device"):
        make_mesh(config)


CHOSEN = MeshConfig(data=-1, fsdp=-1, tensor=-1, context=-1)


@pytest.mark.parametrize(
    ("devices", "rows", "sizes"),
    [
        (8, 128, (1, 8, 1, 1)),
        (64, 128, (8, 8, 1, 1)),
        (256, 128, (32, 4, 1, 2)),
        (1024, 128, (16, 8, 1, 8)),
        (1024, 512, (128, 4, 1, 2)),
        (16, 1, (1, 1, 2, 8)),
        (1, 128, (1, 1, 1, 1)),
    ],
)
def test_data_over_nodes_fsdp_inside_and_the_rest_to_frames(devices: int, rows: int, sizes: tuple) -> None:
    assert tuple(mesh_sizes(CHOSEN, devices, rows=rows, node=8).values()) == sizes


def test_chosen_axes_beside_given_ones() -> None:
    config = MeshConfig(data=-1, fsdp=-1, tensor=2)
    assert tuple(mesh_sizes(config, 32, rows=64, node=8).values()) == (4, 4, 2, 1)
    assert make_mesh(MeshConfig(data=-1, fsdp=-1, context=-1), rows=4).shape["context"] == 2
    with pytest.raises(
        ConfigError, match=r"16 of 32 devices would share 8 rows, .* divide over 8; set context"
    ):
        mesh_sizes(config, 32, rows=8, node=8)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh over several hosts is made from."""

    id: int
    slice_index: int
    device_kind: str = "cpu"
    platform: str = "cpu"


@pytest.mark.parametrize(
    ("sizes", "spans"),
    [
        ({"data": 4, "fsdp": 2}, {"data"}),
        ({"data": 1, "fsdp": 4, "tensor": 2}, {"fsdp"}),
        ({"data": 1, "tensor": 2, "context": 4}, {"context"}),
        ({"data": 2, "fsdp": 4}, {"data", "fsdp"}),
    ],
)
def test_the_axes_that_span_hosts_are_the_outermost_that_can(sizes: dict[str, int], spans: set[str]) -> None:
    """Along every other axis, neighbours are of one host."""
    hosts = 4 if len(spans) == 2 else 2
    devices = [FakeDevice(id, id * hosts // 8) for id in range(8)]
    found = _over_slices(devices, [sizes.get(axis, 1) for axis in MESH_AXES])
    assert sorted(device.id for device in found.flat) == list(range(8))
    host_of = np.vectorize(lambda device_id: devices[device_id].slice_index)(
        np.array([device.id for device in found.flat]).reshape(found.shape)
    )
    assert {
        axis for place, axis in enumerate(MESH_AXES) if (np.diff(host_of, axis=place) != 0).any()
    } == spans


def test_hosts_need_the_same_number_of_devices() -> None:
    with pytest.raises(ConfigError, match=r"the 2 hosts or slices of this run have \[1, 3\] devices"):
        _over_slices([FakeDevice(id, min(id, 1)) for id in range(4)], [4, 1, 1, 1])


def test_one_process_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    initialize_processes()
    assert jax.process_count() == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NUM_PROCESSES": "2"}, "COORDINATOR_ADDRESS, PROCESS_ID is not"),
        ({"COORDINATOR_ADDRESS": "x:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"}, "NUM_PROCESSES is 'two'"),
        ({"COORDINATOR_ADDRESS": "x:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"}, "PROCESS_ID is 2"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": ""}, "names a,b, but JAX finds no TPU here"),
    ],
)
def test_bad_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        initialize_processes()


# Each process reads its rows. With context=4 over two processes of two devices, both read the same rows.
TWO_PROCESSES = """
    import sys
    import jax, numpy as np
    from crosslmm_jax.batch import Batch
    from crosslmm_jax.config import MeshConfig
    from crosslmm_jax.parallel import initialize_processes, make_mesh, row_shard, to_global
    initialize_processes()
    cases = (dict(data=2, fsdp=2), 2), (dict(data=2, tensor=2), 2), (dict(data=1, context=4), 1)
    for sizes, shares in cases:
        mesh = make_mesh(MeshConfig(**sizes))
        index, count = row_shard(mesh)
        assert count == shares, (sizes, count)
        tokens = np.arange(4 * 3, dtype=np.int32).reshape(4, 3)
        frames = np.arange(4 * 8 * 3, dtype=np.uint8).reshape(4, 8, 1, 1, 3)
        mine = slice(index * 4 // count, (index + 1) * 4 // count)
        slots = np.zeros((4 // count, 0), np.int32)
        batch = Batch.create(
            tokens=tokens[mine], visible_frames=tokens[mine], visual_slots=slots, frames=frames[mine]
        )
        arrays = to_global(batch, mesh, num_shards=count).arrays()
        for name, whole in (("tokens", tokens), ("frames", frames), ("visible_frames", tokens)):
            assert arrays[name].shape == whole.shape
            for shard in arrays[name].addressable_shards:
                assert np.array_equal(shard.data, whole[shard.index]), (sizes, name)
    print("ok")
"""


@pytest.fixture(params=["one host", "two hosts"])
def as_on_hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[int], list[str]]:
    """`as_on_hosts(index)`: words before a command that make it process `index` of one host or of two.

    Hosts differ in what Linux says about their last start; by it jax tells which devices share a host.
    """

    def words(index: int) -> list[str]:
        if request.param == "one host":
            return []
        boot = tmp_path / f"boot{index}"
        boot.write_text(f"{index + 1}1111111-1111-4111-8111-111111111111\n")
        mount = f"mount --bind {boot} /proc/sys/kernel/random/boot_id"
        return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]

    if shutil.which("unshare") is None or subprocess.run([*words(0), "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    return words


@pytest.mark.multihost
def test_two_processes_share_a_batch(free_port, as_on_hosts) -> None:
    port = free_port()
    processes = []
    for index in range(2):
        environment = os.environ | {
            "COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(index),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }  # fmt: skip
        command = [*as_on_hosts(index), sys.executable, "-c", textwrap.dedent(TWO_PROCESSES)]
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [output.strip().splitlines()[-1:] for output in outputs] == [["ok"], ["ok"]], outputs
