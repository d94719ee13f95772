"""What each process adds to a report: its time, memory and bad rows; gathered in one collective operation."""

import json
import resource
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TypedDict

import jax

from crosslmm_jax.errors import Fault
from crosslmm_jax.parallel import gather
from crosslmm_jax.train.reporting.metrics_window import Window

ROOM = 8192  # bytes of one process's share; the longest reason, in JSON, takes 4,800
_DETAIL = 400  # characters of the reason why a row is bad
_TICK_S = 0.1
_PAUSE_S = 0.5  # a shorter delay of a tick is the scheduler's


class BadRow(TypedDict):
    """A row that is replaced, as other processes and log.jsonl have it."""

    row: int
    reason: str
    detail: str


class HostShare(TypedDict):
    """What one process says of the steps since the last report."""

    input_wait: float  # seconds of all steps
    own: float  # seconds in which the others may have waited for it
    paused: float  # seconds in which it did not run at all
    longest: tuple[int, float, float]  # the step of most own time, that time, and input wait in it
    flops: float
    device_memory_gb: float | None
    host_memory_gb: float
    faults: dict[str, int]
    truncated: dict[str, int]
    bad_rows: list[BadRow]


class Hosts:
    """What the processes of a run tell each other of themselves.

    Attributes:
      names: host name of each process.
      devices: number of devices of each process.
      gpus: number of GPUs of each process's host, used or not; 0 where the run uses none.
    """

    def __init__(self) -> None:
        """Asks all processes for their names."""
        gpus = count_gpus() if jax.default_backend() == "gpu" else 0
        here = {"name": socket.gethostname(), "devices": jax.local_device_count(), "gpus": gpus}
        found = gather(here)
        self.names: list[str] = [each["name"] for each in found]
        self.devices: list[int] = [each["devices"] for each in found]
        self.gpus: list[int] = [each["gpus"] for each in found]
        self._pauses = PauseMeter()
        self._waiting: list[BadRow] = []  # for room in a report

    def gather(
        self, window: Window, *, faults: dict[str, int], truncated: dict[str, int], bad_rows: list[Fault]
    ) -> list[HostShare]:
        """The shares of all processes. Bad rows that have no room wait for the next report."""
        self._waiting += [
            BadRow(row=fault.row, reason=fault.reason, detail=shorten(str(fault), _DETAIL))
            for fault in bad_rows
        ]
        step, times = window.longest_own
        share = HostShare(
            input_wait=window.phases.get("input_wait", 0.0),
            own=window.phases.get("input_wait", 0.0),
            paused=self._pauses.take(),
            longest=(step, times.own, times.phases.get("input_wait", 0.0)),
            flops=window.work.flops,
            device_memory_gb=device_memory_peak_gb(),
            host_memory_gb=host_memory_peak_gb(),
            faults=faults,
            truncated=truncated,
            bad_rows=[],
        )
        left = ROOM - len(json.dumps(share))
        while self._waiting and (left := left - len(json.dumps(self._waiting[0])) - 2) >= 0:
            share["bad_rows"].append(self._waiting.pop(0))
        return gather(share, room=ROOM)

    def close(self) -> None:
        """Ends the thread that sees pauses."""
        self._pauses.close()


def count_gpus(folder: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """The GPUs of this host, or those that its container has, whether or not this process may use them."""
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def idle_gpus(names: list[str], devices: list[int], gpus: list[int]) -> list[str]:
    """A line for each host of whose GPUs no process uses some. Arguments are attributes of `Hosts`."""
    used: Counter[str] = Counter()
    for name, count in zip(names, devices, strict=True):
        used[name] += count
    present = dict(zip(names, gpus, strict=True))
    return [
        f"host {name}: {count} of {present[name]} GPUs used; if the others are yours, start one process per"
        " GPU, or one that sees them all (docs/several_hosts.md)"
        for name, count in used.items()
        if count < present[name]
    ]


def added(counts: list[dict[str, int]]) -> dict[str, int]:
    """The sum of several counts, in the order of their names."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def shorten(text: str, length: int) -> str:
    """`text`, or its first quarter and its end in `length` characters: a file and what is wrong come last."""
    if len(text) <= length:
        return text
    cut = " ... "
    head = length // 4
    return text[:head] + cut + text[len(text) - (length - head - len(cut)) :]


class PauseMeter:
    """Sees when the whole process did not run: it was stopped, its host was frozen, or had no memory."""

    def __init__(self) -> None:
        """Starts a thread that wants to run ten times per second."""
        self._seconds, self._closed = 0.0, threading.Event()
        threading.Thread(target=self._tick, name="pause-meter", daemon=True).start()

    def _tick(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(_TICK_S):
            now = time.monotonic()
            if (late := now - before - _TICK_S) >= _PAUSE_S:
                self._seconds += late
            before = now

    def take(self) -> float:
        """Seconds of pauses since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()


def device_memory_peak_gb() -> float | None:
    """The most memory that a device of this process has had in use, in 10^9 bytes, where it is reported."""
    peaks: list[int] = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}  # a CPU keeps none
        peaks += [stats["peak_bytes_in_use"]] if "peak_bytes_in_use" in stats else []
    return round(max(peaks) / 1e9, 3) if peaks else None


def host_memory_peak_gb() -> float:
    """The most memory that this process has had, in 10^9 bytes, without its worker processes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)
