"""Metrics, TensorBoard and progress may fail or hang; training goes on. All faults are real."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from crosslmm_jax.train.guards import interrupt
from crosslmm_jax.train.reporting import metrics_log
from crosslmm_jax.train.reporting.metrics_log import METRICS_FILE, MetricsLog, read_metrics
from crosslmm_jax.train.reporting.side_channel import MAX_WAITING_CALLS, SideChannel
from crosslmm_jax.utils import Progress

INTERRUPT = Path(interrupt.__file__)


def line(step: int) -> dict[str, object]:
    return {"step": step, "loss": 1.0 / step, "gate": {"v2v": {str(layer): 0.5 for layer in range(200)}}}


def test_metrics_of_a_full_disk_are_written_once_there_is_space(mount_disk, fill, caplog) -> None:
    disk = mount_disk(kilobytes=256)
    log = MetricsLog(disk, resumed_step=0, tensorboard=True)
    log.write(line(1))
    log.wait()
    filler = fill(disk)
    for step in range(2, 30):  # many more calls than tensorboardX's own queue takes
        log.write(line(step))
    log.wait()
    assert read_metrics(disk) == [line(1)], "and no half line after it"
    filler.unlink()
    log.write(line(30))
    log.close()
    assert read_metrics(disk) == [line(step) for step in range(1, 31)]
    said = sorted(caplog.messages)
    reason = "cannot be written (No space left on device); training goes on without it"
    assert said == [f"{disk}/{METRICS_FILE} {reason}", f"{disk}/tensorboard {reason}"]


def test_a_run_that_resumes_on_a_full_disk_drops_later_lines(mount_disk, fill) -> None:
    disk = mount_disk(kilobytes=64)
    log = MetricsLog(disk, resumed_step=0, tensorboard=False)
    for step in (1, 2, 3):
        log.write(line(step))
    log.close()
    fill(disk)
    MetricsLog(disk, resumed_step=1, tensorboard=False).close()
    assert read_metrics(disk) == [line(1)]


def test_a_file_that_hangs_is_left_behind(tmp_path, monkeypatch, caplog) -> None:
    """A pipe that nobody reads blocks its writer, as a network disk does whose server is away."""
    os.mkfifo(tmp_path / METRICS_FILE)
    monkeypatch.setattr(metrics_log, "MAX_WAIT_S", 0.2)
    begin = time.monotonic()
    log = MetricsLog(tmp_path, resumed_step=0, tensorboard=False)
    for step in range(1, 100):
        log.write(line(step))
        log.wait()
    log.close()
    assert time.monotonic() - begin < 1, "waited for once, not 99 times"
    assert caplog.messages == [f"{tmp_path}/{METRICS_FILE} hangs; training goes on without it"]


def test_calls_beyond_the_limit_are_dropped(caplog) -> None:
    goes_on, done = threading.Event(), []

    class Slow:
        def close(self) -> None:
            done.append("closed")

    channel = SideChannel("x", Slow)
    channel.call(lambda _: goes_on.wait() and None)
    for number in range(MAX_WAITING_CALLS + 5):
        channel.call(lambda _, number=number: done.append(number))
    goes_on.set()
    channel.wait(10)
    channel.call(lambda _: done.append("later"))
    channel.close(10)
    assert MAX_WAITING_CALLS - 1 <= done.index("later") <= MAX_WAITING_CALLS
    assert done[-1] == "closed"
    assert len(caplog.messages) == 1 and "x hangs" in caplog.text


def test_progress_without_a_reader(monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w", buffering=1))
    with Progress("x", unit="steps", seconds_between_lines=0) as progress:
        progress.update(1)
        progress.report(2, "loss 1")
    with pytest.raises(BrokenPipeError):
        print("the pipe is broken", file=sys.stderr, flush=True)


def test_a_second_ctrl_c_says_what_is_lost() -> None:
    with interrupt.StopRequest(deadline_s=60) as stop:
        stop.nothing_to_save = False
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(1)
        with pytest.raises(KeyboardInterrupt, match="steps since the newest checkpoint are lost; the same"):
            signal.raise_signal(signal.SIGINT)


# The main thread ends in a lock of C, where Python runs no signal handler.
DEAF = """
    import ctypes, os, runpy, signal, sys
    StopRequest = runpy.run_path(sys.argv[1])["StopRequest"]
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    with StopRequest(deadline_s=float(sys.argv[2])) as stop:
        stop.nothing_to_save = False
        print("ready", flush=True)
        libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize(
    ("deadline", "signals", "code", "prefix"),
    [("0.3", ["SIGTERM"], 75, "crosslmm: error: "), ("60", ["SIGINT", "SIGINT"], 130, "crosslmm: ")],
)
def test_a_signal_acts_where_the_main_thread_is_stuck(
    deadline: str, signals: list[str], code: int, prefix: str, tmp_path
) -> None:
    program = textwrap.dedent(DEAF)
    interrupt = tmp_path / "interrupt.py"
    interrupt.write_text(INTERRUPT.read_text().replace("SECOND_STOP_S = 5.0", "SECOND_STOP_S = 0.3"))
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(interrupt), deadline],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for name in signals:
        process.send_signal(getattr(signal, name))
        time.sleep(0.05)  # or two signals are one
    _, error = process.communicate(timeout=30)
    assert process.returncode == code, error
    assert error == (
        f"{prefix}stopped 0 s after the signal without saving: the run did not end by itself; the same"
        " command resumes from the newest checkpoint\n"
    )
