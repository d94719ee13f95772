"""What a report says: FLOPs of real rows, the slowest step and host, pauses; files that survive a kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.errors import REASONS
from crosslmm_jax.model import flops
from crosslmm_jax.train.reporting.hosts import ROOM, HostShare, shorten
from crosslmm_jax.train.reporting.json_lines import JsonLines, read_lines
from crosslmm_jax.train.reporting.metrics_line import metrics_line, note_of
from crosslmm_jax.train.reporting.metrics_window import StepTimes, Window
from crosslmm_jax.train.reporting.work import Work, WorkCounter


def times_of(**phases: float) -> StepTimes:
    times = StepTimes()
    times.phases.update(phases)  # type: ignore[call-overload]
    times.work, times.shape = Work(tokens=1), (64, 512)
    return times


def window_of(steps: dict[int, StepTimes], *, seconds: float) -> Window:
    phases: dict = {}
    for times in steps.values():
        for name, value in times.phases.items():
            phases[name] = phases.get(name, 0.0) + value
    return Window(
        loss=2.5, grad_norm=1.0, gate={"v2v": np.array([0.25], np.float32)}, targets=10, total_targets=40,
        work=Work(tokens=8000, frames=256, flops=3e12), steps=4, seconds=seconds, phases=phases,
        slowest=max(steps.items(), key=lambda item: item[1].total),
        longest_own=max(steps.items(), key=lambda item: item[1].own), median=1.0,
    )  # fmt: skip


def share_of(**fields: object) -> HostShare:
    share = {
        "input_wait": 0.0, "own": 0.1, "paused": 0.0, "longest": (235, 0.05, 0.0), "flops": 3e12,
        "device_memory_gb": None, "host_memory_gb": 1.0, "faults": {}, "truncated": {"rows": 0, "turns": 0},
        "bad_rows": [],
    }  # fmt: skip
    return HostShare(**(share | fields))  # type: ignore[typeddict-item]


@pytest.fixture
def line_of(experiment, tmp_path):
    """`line_of(window, shares)`: the line of step 240, on two devices with a peak of 10 TFLOP/s."""

    def make(window: Window, shares: list[HostShare]) -> dict:
        names = [f"node-{index}" for index in range(len(shares))]
        return metrics_line(
            240, window, shares, config=experiment(tmp_path), names=names, num_devices=2, peak_tflops=10.0
        )

    return make


def test_a_line_names_the_slow_step_and_the_host_that_it_waited_for(line_of) -> None:
    # Process 0 only sees that the devices took long for step 237.
    steps = {step: times_of(dispatch=0.1, device_wait=0.9) for step in (238, 239, 240)}
    steps[237] = times_of(dispatch=0.1, device_wait=11.9)
    late = share_of(
        input_wait=11.2, own=11.3, longest=(237, 11.3, 11.2), faults={"missing": 2}, host_memory_gb=3.0
    )
    line = line_of(window_of(steps, seconds=15.0), [share_of(faults={"missing": 1}), late, share_of()])
    assert line["slowest_step"]["step"] == 237 and line["slowest_step"]["process"] == 1
    assert line["slowest_step"]["input_wait_seconds"] == 11.2
    assert (line["slowest_step"]["frames"], line["slowest_step"]["text_tokens"]) == (64, 512)
    assert line["slowest_host"]["process"] == 1 and line["slowest_host"]["host"] == "node-1"
    assert line["hosts"]["input_wait_seconds"] == [0.0, 2.8, 0.0]
    assert line["hosts"]["bad_rows"] == [1, 2, 0]
    assert line["faults"] == {"missing": 3} and line["host_memory_peak_gb"] == 3.0
    assert line["input_wait_seconds"] == 2.8 and line["step_seconds"] == 3.75
    note = note_of(line)
    assert "slowest: process 1 on node-1" in note
    assert "step 237 took 12.0 s, 11.2 s of input wait on process 1 (node-1)" in note


def test_times_and_rates_of_a_line(line_of) -> None:
    steps = {1: times_of(compile=4.0, checkpoint=2.0, validation=3.0), 2: times_of(input_wait=0.4)}
    line = line_of(window_of(steps, seconds=15.0), [share_of(input_wait=0.4, own=0.4)])
    assert line["step_seconds"] == pytest.approx(10 / 4)  # without checkpoint and validation
    assert (line["checkpoint_seconds"], line["validation_seconds"], line["compile_seconds"]) == (2, 3, 4)
    assert line["compute_seconds"] == pytest.approx((10 - 4 - 0.4) / 4)
    assert line["frames_per_second"] == pytest.approx(25.6) and line["targets_per_second"] == pytest.approx(4)
    assert line["model_tflops_per_device"] == pytest.approx(3 / 10 / 2)
    assert line["model_flops_utilisation"] == pytest.approx(0.015)
    assert "hosts" not in line and "device_memory_peak_gb" not in line


def test_a_host_that_did_not_run_is_the_slowest(line_of) -> None:
    window = window_of({237: times_of(dispatch=0.1, device_wait=2.0)}, seconds=8.0)
    line = line_of(window, [share_of(), share_of(paused=2.0)])
    assert line["slowest_host"]["process"] == 1 and line["paused_seconds"] == 2.0
    assert "process 1 on node-1, which did not run for 2.0 s" in note_of(line)


def test_flops_are_those_of_the_rows_without_their_padding(make_batch, make_stage) -> None:
    config = presets.tiny()
    stage = make_stage(trainable=("projector", "v2v"), directions=("v2v",))
    batch = make_batch(config, batch=2, frames=4, text=10, before=3, valid_frames=(4, 2), valid_text=(10, 7))
    work = WorkCounter(config, stage, num_shards=3).count(batch)
    assert (work.tokens, work.frames) == (3 * batch.tokens.size, 3 * 2 * 4)
    of_stage = dataclasses.replace(
        config, cross_attention=dataclasses.replace(config.cross_attention, directions=("v2v",))
    )
    expected = sum(
        flops.total(
            flops.train(
                of_stage, flops.Workload(frames=frames, text=text, before=3),
                targets=int(batch.loss_mask[row].sum()), learns=dict.fromkeys(stage.trainable, 1.0),
            )
        )
        for row, (frames, text) in enumerate([(4, 10), (2, 7)])
    )  # fmt: skip
    assert work.flops == pytest.approx(expected)


def test_peak_flops_are_those_of_bfloat16() -> None:
    config = presets.crosslmm_2b()
    assert flops.peak_tflops("NVIDIA H200", config) == 989
    assert flops.peak_tflops("cpu", config) is None
    assert flops.peak_tflops("NVIDIA H200", dataclasses.replace(config, compute_dtype="float32")) is None


def test_a_share_has_room_for_every_reason(line_of) -> None:
    number = 12_345.678901234567
    share = share_of(
        input_wait=number, own=number, paused=number, longest=(10**7, number, number), flops=number * 1e12,
        device_memory_gb=123.456, host_memory_gb=123.456, faults=dict.fromkeys(REASONS, 10**6),
        truncated={"rows": 10**6, "turns": 10**6},
    )  # fmt: skip
    longest = shorten("\N{CLAPPER BOARD}" * 1000, 400)
    assert len(json.dumps(share)) + len(json.dumps(longest)) < ROOM - 200


def test_a_long_reason_keeps_the_file_and_the_fault() -> None:
    where = "/a" * 200 + "/train.json: row 7: "
    reason = where + "/b" * 80 + "/train_00001.mp4: no such file"
    short = shorten(reason, 400)
    assert len(short) == 400 and short.startswith("/a/a") and short.endswith("/train_00001.mp4: no such file")
    assert shorten("short", 400) == "short"


def test_lines_after_a_kill_in_the_middle_of_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "ev')
    lines = JsonLines(path)
    lines.write({"step": 3})
    lines.close()
    assert read_lines(path) == [{"step": 1}, {"step": 3}]


PAUSED = """
    import time
    from crosslmm_jax.train.reporting.hosts import PauseMeter
    meter = PauseMeter()
    print("ready", flush=True)
    input()
    time.sleep(0.3)
    print(meter.take(), flush=True)
"""


def test_a_stopped_process_notices() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PAUSED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate("\n", timeout=60)
    assert float(said) > 1
