"""Eight simulated CPU devices for every test, and the fixtures that several rooms share."""

import collections
import contextlib
import dataclasses
import datetime
import gc
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before jax starts its backend. Programs that ask for no mesh still run on one device.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads that run programs, by default as many as there are devices. A device's part of a program waits on
# its thread for the other parts and for what earlier programs make; with 8 threads for 8 devices all of them
# have been seen to wait, until XLA ended the process after 40 seconds.
os.environ.setdefault("NPROC", "16")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # Tests compile hundreds of small programs and run each once or twice: compiling fast beats running fast.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=240"
    if metadata.version("jaxlib").startswith("0.10."):  # later ones have no such flag, and end over it
        flags += " --xla_cpu_use_fusion_emitters=false"  # half the time to compile
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

# Compiled programs are kept beside pytest's own cache: the next run, and every process that a test starts,
# read them instead of compiling. `pytest --cache-clear` removes them.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.batch import Batch
from crosslmm_jax.config import ModelConfig

if TYPE_CHECKING:
    from crosslmm_jax.demo.synthetic import SyntheticSet


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker in ("gpu", "nightly"):
        parser.addoption(
            f"--{marker}-report", metavar="PATH", help=f"write what the tests marked {marker} found, as JSON"
        )


# Why a test may be skipped. Any other reason fails the run: a test that nobody runs is no test.
MAY_SKIP = (
    r"needs a GPU",
    r"needs a Hopper GPU",
    r"the real (clips|vocabulary) (are|is) not here",
    r"this ffmpeg has no \w+",
    r"this PyAV cannot write the rotation",
    r"only root may mount a disk",
    r"root may read everything",
    r"needs Linux's /proc",
    r"pillow-heif is not installed",
    r"this jax has no Mosaic GPU",
    r"the CRD of JobSet is not here",
    r"needs SLURM and root",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nightly tests run only when `-m` names them; files with slow tests come first.

    Of two processes, the one that takes such a file last would work on it alone.
    """
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if "nightly" in item.keywords]
        if nightly:
            config.hook.pytest_deselected(items=nightly)
            items[:] = [item for item in items if "nightly" not in item.keywords]
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)


class SkipReasons:
    """Fails the run when a test was skipped for a reason that is not in MAY_SKIP."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look(report)

    def _look(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple) and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not any(re.fullmatch(pattern, reason) for pattern in MAY_SKIP):
                self.wrong.append(f"{report.nodeid}: {reason}")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.wrong:
            terminalreporter.write_line(f"SKIPPED for a reason that tests/conftest.py does not list: {line}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the first process
        config.pluginmanager.register(SkipReasons())
        config.option.loadscopereorder = False  # pytest-xdist would take files of many tests first
        for marker in ("gpu", "nightly"):
            if path := config.getoption(f"--{marker}-report"):
                config.pluginmanager.register(MarkerReport(marker, Path(path)))


class MarkerReport:
    """Outcome, seconds and properties of each test with a marker, with the device and versions.

    The file is written after each test, so a run that is stopped keeps its results.
    """

    def __init__(self, marker: str, path: Path) -> None:
        self.marker, self.path, self.tests = marker, path, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.marker in report.keywords and (report.when == "call" or report.outcome != "passed"):
            facts = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.tests.append({"test": report.nodeid, **facts, **dict(report.user_properties)})
            self._write()

    def pytest_sessionfinish(self) -> None:
        self._write()

    def _write(self) -> None:
        import jax

        from crosslmm_jax.profiling.report import commit, versions

        found = {
            "command": shlex.join(["pytest", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "versions": versions(),
            "device": jax.devices()[0].device_kind,
            "outcomes": dict(collections.Counter(test["outcome"] for test in self.tests)),
            "tests": self.tests,
        }
        self.path.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="module", autouse=True)
def programs_of_modules():
    """Drops the compiled programs of the modules so far once they hold much memory.

    Each holds some fifteen mappings, of which Linux gives a process 65,530: in one process all tests together
    would run out of them, and XLA ends a process that cannot map what it compiles. No module has 12,000.
    """
    yield
    maps = Path("/proc/self/maps")
    if (jax := sys.modules.get("jax")) and (not maps.exists() or maps.read_text().count("\n") > 25_000):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def one_device_flags() -> str:
    """XLA_FLAGS for a process that a test starts: one device, and to compile as fast as here."""
    return re.sub(r"(xla_force_host_platform_device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])


@pytest.fixture
def free_port() -> Iterator[Callable[[], int]]:
    """`free_port()`: a port for process 0 of several, which nothing else is given until the test ends.

    Held by a socket that never listens: beside it only one that also asks to share the port may have it, as
    the coordinator of JAX does.
    """
    with contextlib.ExitStack() as held:

        def take() -> int:
            holder = held.enter_context(socket.socket())
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            holder.bind(("", 0))
            return holder.getsockname()[1]

        yield take


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`mount_disk(kilobytes=n)`: the folder of a new disk of this size, for those who may mount one."""
    disks: list[Path] = []

    def mount(*, kilobytes: int) -> Path:
        disk = tmp_path / f"disk{len(disks) or ''}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a disk")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="session")
def fill():
    """`fill(disk)`: leaves no byte free on it. Returns the file that takes up the space."""

    def write_until_full(disk: Path) -> Path:
        filler = disk / "filler"
        with filler.open("ab", buffering=0) as file:
            for size in (65_536, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        return filler

    return write_until_full


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from crosslmm_jax.demo.tokenizer import write_default_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_default_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> "SyntheticSet":
    """A few synthetic videos with questions, to be read only."""
    from crosslmm_jax.demo.synthetic import write_dataset

    return write_dataset(tmp_path_factory.mktemp("data") / "set", num_train=16, num_heldout=8, seed=3)


@pytest.fixture(scope="session")
def make_index(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path):
    """`make_index(annotations)`: the folder of a new index of them, made in this process."""

    from crosslmm_jax.data.index.build import build_index

    def make(annotations: Path | str, **options) -> Path:
        out = tmp_path_factory.mktemp("index") / "index"
        build_index(str(annotations), out, tokenizer=str(tokenizer_folder), quiet=True, **options)
        return out

    return make


@pytest.fixture(scope="session")
def check_measured_rows():
    """`check_measured_rows(found)`: what holds for every row that a task measured at the tiny size."""

    def check(found: dict[str, Any]) -> None:
        assert found["facts"]["matmul_tflops"] > 0
        for row in found["rows"]:
            assert (row["system"], row["frames"], row["tokens_per_frame"]) == ("tiny", 2, 1)
            assert len(row["samples_ms"]) == 2
            assert row["ms_min"] <= row["ms"] <= row["ms_max"]
            assert row["peak_from"] == "compiler" and row["peak_mb_allocator"] is None, "a CPU keeps no mark"
            assert row["peak_mb"] > 0 and row["compile_s"] > 0
            assert row["model_tflop"] == pytest.approx(sum(row["parts_tflop"].values()))
            assert row["tflops"] == pytest.approx(1e3 * row["model_tflop"] / row["ms"])
            assert row["fraction_of_matmul"] == pytest.approx(row["tflops"] / found["facts"]["matmul_tflops"])
            assert all("keys: " in line for line in row["attention"]) and row["attention"]

    return check


@pytest.fixture
def tiny_config() -> ModelConfig:
    """The tiny preset with gates open, so that cross-attention matters."""
    return presets.tiny()


@pytest.fixture(scope="session")
def micro_config() -> ModelConfig:
    """Two layers of width 16; cross-attention in the first."""
    tiny = presets.tiny()
    return dataclasses.replace(
        tiny,
        vision=dataclasses.replace(
            tiny.vision, image_size=16, width=16, num_layers=2, num_heads=2, mlp_width=16
        ),
        decoder=dataclasses.replace(
            tiny.decoder, vocab_size=32, width=16, num_layers=2, head_dim=4, mlp_width=32
        ),
        attention="reference",
    )


@pytest.fixture
def replace_config():
    """`replace_config(config, merge={"grid": 2})`: a copy with fields of its parts replaced."""

    def replace(config: ModelConfig, **parts) -> ModelConfig:
        changed = {
            name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in parts.items()
        }
        return dataclasses.replace(config, **changed)

    return replace


@pytest.fixture(scope="session")
def make_batch():
    """A factory of random batches in the layout that the data room makes."""
    return random_batch


def random_batch(
    config: ModelConfig,
    *,
    batch: int = 2,
    frames: int = 4,
    text: int = 10,
    before: int = 3,
    valid_frames: tuple[int, ...] | None = None,
    valid_text: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Batch[np.ndarray]:
    """Rows of `before` text tokens, one video, then text; padding (frames, then text) at the end."""
    rng = np.random.default_rng(seed)
    size, compact = config.vision.image_size, config.merge.tokens_per_frame
    valid_frames = valid_frames or (frames,) * batch
    valid_text = valid_text or (text,) * batch
    total = text + frames * compact
    visual_slots = np.zeros((batch, frames * compact), np.int32)
    visible = np.zeros((batch, total), np.int32)
    loss_mask = np.zeros((batch, total), np.float32)
    for b, (f, t) in enumerate(zip(valid_frames, valid_text, strict=True)):
        end = before + f * compact
        real = end + t - before
        pad_visual = np.arange(real, real + (frames - f) * compact)
        visual_slots[b] = np.r_[np.arange(before, end), pad_visual]
        visible[b, before:real] = f
        loss_mask[b, end + 1 : real] = 1
    draw = np.random.default_rng(seed + 1)
    pixels = draw.integers(0, 256, (batch, 64, size, size, 3), dtype=np.uint8)[:, :frames]
    tokens = rng.integers(0, config.decoder.vocab_size, (batch, 4096)).astype(np.int32)[:, :total]
    return Batch.create(
        tokens=tokens, visual_slots=visual_slots, visible_frames=visible, frames=pixels, loss_mask=loss_mask,
        frame_times=np.tile(np.arange(frames, dtype=np.float32), (batch, 1)),
        row_index=np.arange(batch, dtype=np.int32),
    )  # fmt: skip


@pytest.fixture(scope="session")
def interleaved_batch():
    """A factory of batches whose rows alternate text and videos."""
    return batch_of_parts


def batch_of_parts(
    config: ModelConfig, rows: list[list[int | tuple[int]]], *, frames: int, text: int
) -> Batch[np.ndarray]:
    """Rows of text lengths (int) and videos (a tuple with the number of frames), padded to static sizes."""
    rng = np.random.default_rng(1)
    compact, total = config.merge.tokens_per_frame, text + frames * config.merge.tokens_per_frame
    size = config.vision.image_size
    pixels = rng.integers(0, 256, (len(rows), frames, size, size, 3), dtype=np.uint8)
    tokens = rng.integers(0, config.decoder.vocab_size, (len(rows), total)).astype(np.int32)
    visible, loss_mask = np.zeros((len(rows), total), np.int32), np.zeros((len(rows), total), np.float32)
    visual_slots = []
    for b, row in enumerate(rows):
        visual, at, seen = [], 0, 0
        for part in row:
            seen += part[0] if isinstance(part, tuple) else 0
            length = part[0] * compact if isinstance(part, tuple) else part
            visible[b, at : at + length] = seen
            if isinstance(part, tuple):
                visual += range(at, at + length)
            else:
                loss_mask[b, at + 1 : at + length] = 1
            at += length
        visual += range(at, at + (frames - seen) * compact)
        visual_slots.append(visual)
    return Batch.create(
        tokens=tokens, visual_slots=np.array(visual_slots, np.int32), visible_frames=visible, frames=pixels,
        loss_mask=loss_mask,
    )  # fmt: skip


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background, without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
