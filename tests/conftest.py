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
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

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

import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import ModelConfig


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-report", metavar="PATH", help="write what the tests marked gpu found, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gpu-report")
    if path and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to the first process
        config.pluginmanager.register(GpuReport(Path(path)))


class GpuReport:
    """Outcome, seconds and properties of each test marked gpu, with the device and versions.

    The file is written anew after each test: what a run that is stopped has found is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.tests = path, []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "gpu" in report.keywords and (report.when == "call" or report.outcome != "passed"):
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
def tiny_config() -> ModelConfig:
    """The tiny preset with gates open, so that cross-attention matters."""
    return presets.tiny()


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
) -> dict[str, np.ndarray]:
    """Rows of `before` text tokens, one video, then text; padding (frames, then text) at the end."""
    rng = np.random.default_rng(seed)
    size, compact = config.vision.image_size, config.merge.tokens_per_frame
    valid_frames = valid_frames or (frames,) * batch
    valid_text = valid_text or (text,) * batch
    total = text + frames * compact
    visual_slots = np.zeros((batch, frames * compact), np.int32)
    text_slots = np.zeros((batch, text), np.int32)
    visible = np.zeros((batch, total), np.int32)
    loss_mask = np.zeros((batch, total), np.float32)
    for b, (f, t) in enumerate(zip(valid_frames, valid_text, strict=True)):
        end = before + f * compact
        real = end + t - before
        pad_visual = np.arange(real, real + (frames - f) * compact)
        visual_slots[b] = np.r_[np.arange(before, end), pad_visual]
        text_slots[b] = np.setdiff1d(np.arange(total), visual_slots[b])
        visible[b, before:real] = f
        loss_mask[b, end + 1 : real] = 1
    draw = np.random.default_rng(seed + 1)
    pixels = draw.integers(0, 256, (batch, 64, size, size, 3), dtype=np.uint8)[:, :frames]
    tokens = rng.integers(0, config.decoder.vocab_size, (batch, 4096)).astype(np.int32)[:, :total]
    return {
        "frames": pixels,
        "frame_mask": np.arange(frames) < np.array(valid_frames)[:, None],
        "frame_times": np.tile(np.arange(frames, dtype=np.float32), (batch, 1)),
        "tokens": tokens,
        "positions": np.tile(np.arange(total, dtype=np.int32), (batch, 1)),
        "loss_mask": loss_mask,
        "visual_slots": visual_slots,
        "text_slots": text_slots,
        "visible_frames": visible,
        "row_index": np.arange(batch, dtype=np.int32),
    }
