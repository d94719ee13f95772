"""The metrics of a run of two processes, of which one is slow and both have bad rows."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crosslmm_jax.config import ValidationConfig
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.train import loop
from crosslmm_jax.train.reporting import read_log, read_metrics

STEPS = 30


@pytest.mark.slow
@pytest.mark.multihost
def test_the_slow_process_and_all_bad_rows_are_named(
    experiment, files, config_file, one_device_flags, free_port, tmp_path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(files / "data", data)
    for name in ("train", "heldout"):
        build_index(
            str(data / f"{name}.json"), tmp_path / name, tokenizer=str(files / "tokenizer"), quiet=True
        )
    (data / "videos" / "train_00001.mp4").unlink()
    config = experiment(tmp_path / "two", stage={"steps": STEPS}, log_every=1, save_every=STEPS)
    validation = ValidationConfig(index=str(tmp_path / "heldout"), every=STEPS)
    changed = dataclasses.replace(
        config.data, index=str(tmp_path / "train"), validation=validation, max_bad_fraction=1.0
    )
    config = dataclasses.replace(config, data=changed)
    out, path = Path(config.run.out), config_file(config)
    shared = os.environ | {
        "COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "NUM_PROCESSES": "2",
        "XLA_FLAGS": one_device_flags,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "crosslmm_jax.cli", "train", path],
            env=shared | {"PROCESS_ID": str(index)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        limit = time.monotonic() + 200
        while not any(line["step"] >= 3 for line in read_metrics(out)):
            assert time.monotonic() < limit and all(process.poll() is None for process in processes)
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(3)
        processes[1].send_signal(signal.SIGCONT)
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = read_metrics(out)
    paused = max(lines[3:], key=lambda line: line["paused_seconds"])
    assert paused["slowest_host"]["process"] == 1 and paused["paused_seconds"] > 2
    assert paused["hosts"]["paused_seconds"][1] > 2
    bad = [sum(line["hosts"]["bad_rows"][index] for line in lines) for index in range(2)]
    assert min(bad) > 0 and sum(bad) == sum(line["faults"].get("missing", 0) for line in lines)
    named = [event for event in read_log(out) if event["event"] == "bad_row"]
    assert {event["process"] for event in named} == {0, 1}
    assert all("train_00001.mp4" in event["detail"] for event in named)
    (start,) = (event for event in read_log(out) if event["event"] == "start")
    assert len(start["hosts"]) == 2 and start["devices"] == [1, 1]
    # One process with two of its devices computes the same.
    alone = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(tmp_path / "one")))
    result = loop.train(alone, quiet=True)
    ours, theirs = lines[-1]["validation"], result.metrics[-1]["validation"]
    assert ours["targets"] == theirs["targets"] and ours["rows"] == theirs["rows"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
