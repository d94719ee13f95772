"""`crosslmm watch` on a run that goes on, has ended, or is none; wandb's log; traces of steps."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crosslmm_jax.cli.app import main
from crosslmm_jax.config import RunConfig
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.train import loop
from crosslmm_jax.train.reporting import SideChannel, read_log, wandb_log
from crosslmm_jax.train.reporting.wandb_log import WandbLog, check_wandb

START = {
    "time": "2026-01-02T03:04:05.678+00:00", "event": "start", "step": 0, "stage": "stage2", "steps": 300,
    "resumed_step": 0, "hosts": ["node-a", "node-b"], "devices": [4, 4], "device_kind": "NVIDIA H200",
    "mesh": {"data": 1, "fsdp": 8}, "parameters": {"total": 2_000_000, "trainable": 1_000_000},
}  # fmt: skip


def line(step: int, **more: object) -> dict:
    slow = {"step": step, "seconds": 1.0, "median_seconds": 1.0, "device_wait_seconds": 0.9}
    if step == 240:
        slow |= {"step": 237, "seconds": 12.0, "input_wait_seconds": 11.2, "process": 1, "host": "node-b"}
    host = {"process": 1, "host": "node-b", "others_wait_seconds": 0.5}
    return {
        "step": step, "loss": 100 / step, "step_seconds": 2.0, "tokens_per_second": 40_000.0,
        "slowest_step": slow, "slowest_host": host, "faults": {"missing": 1},
        "gate": {"v2v": {"0": step / 1000}},
    } | more  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 240 of 300 steps that was killed."""
    found = {"loss": 3.25, "accuracy": 0.5, "targets": 10, "rows": 2, "seconds": 1.0}
    lines = [line(step, **({"validation": found} if step == 100 else {})) for step in range(10, 250, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    validated = {"time": START["time"], "event": "validated", "step": 100, "best": True, **found}
    (tmp_path / "log.jsonl").write_text(json.dumps(START) + "\n" + json.dumps(validated) + "\n")
    return tmp_path


def test_a_run_read_by_someone_who_was_not_there(run, capsys) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 250, "lo')  # being written
    assert main(["watch", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{run}: stage2, step 240 of 300, stopped; the same command resumes" in said
    assert "8 x NVIDIA H200, mesh data=1 fsdp=8; 2 processes on node-a, node-b" in said
    assert (
        "2,000,000 parameters, 1,000,000 trainable; last start after step 0, 2026-01-02 03:04:05 UTC" in said
    )
    assert "best validation loss 3.2500, after step 100" in said
    assert "step 237 took 12.0 s: input_wait 11.2 s on process 1 (node-b)" in said
    assert "slowest: process 1 on node-b" in said and "rows replaced: 24 missing" in said
    assert "gate v2v 0" in said and "\x1b" not in said


def test_whether_a_run_goes_on(run, capsys) -> None:
    (run / "owner.json").write_text("{}")
    main(["watch", str(run), "--no-follow"])
    assert "running, about 0:02:00 left" in capsys.readouterr().out
    os.utime(run / "owner.json", (0, 0))
    main(["watch", str(run)])
    assert "without a sign of life for" in capsys.readouterr().out
    (run / "owner.json").unlink()
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    main(["watch", str(run), "--follow"])  # ends by itself: so has the run
    assert "finished" in capsys.readouterr().out


def test_a_folder_without_a_run(tmp_path, capsys) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        assert main(["watch", str(folder)]) == 2
        assert "give the folder of a run, as run.out of its config" in capsys.readouterr().err


def test_watching_needs_no_jax(run) -> None:
    program = (
        "import sys; sys.modules['jax'] = None; from crosslmm_jax.cli import main;"
        " sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "watch", str(run)], capture_output=True, text=True
    )
    assert result.returncode == 0 and "step 240 of 300" in result.stdout, result.stderr


FAKE_WANDB = """
    import json, os, pathlib, time
    class Settings:
        def __init__(self, **given):
            pass
    class Run:
        def __init__(self, **given):
            self.path = pathlib.Path(given["dir"]) / "said.jsonl"
            if os.environ["FAULT"] == "init":
                raise OSError("no service")
            self.say({name: given[name] for name in ("project", "name", "id", "resume")})
        def say(self, what):
            print("for people")
            with self.path.open("a") as file:
                file.write(json.dumps(what) + chr(10))
        def log(self, scalars, step):
            if os.environ["FAULT"] == "crash":
                os._exit(3)
            self.say({"step": step, **scalars})
        def finish(self):
            time.sleep(600 * (os.environ["FAULT"] == "hang"))
            self.say("finish")
    def init(settings, **given):
        return Run(**given)
"""


@pytest.fixture
def wandb_run(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """`wandb_run(fault)`: the folder of a run with a fake wandb that may have a fault."""
    packages, out = tmp_path / "packages", tmp_path / "run"
    packages.mkdir()
    out.mkdir()
    with pytest.raises(UserError, match=r"run\.wandb is 'p', but the package wandb is not installed: pip"):
        check_wandb("p")
    (packages / "wandb.py").write_text(textwrap.dedent(FAKE_WANDB))
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    check_wandb("p")

    def with_fault(fault: str) -> Path:
        monkeypatch.setenv("FAULT", fault)
        return out

    return with_fault


def test_weights_and_biases_get_the_same_run_after_a_resume(wandb_run) -> None:
    out = wandb_run("none")
    for step in (10, 20):
        log = WandbLog(out, "p", {})
        hosts = {"slowest_host": {"host": "a", "process": 1}, "hosts": {"x": [1]}}
        log.write({"step": step, "loss": 1.5, **hosts})
        log.close()
    said = [json.loads(each) for each in (out / "said.jsonl").read_text().splitlines()]
    assert said[0] == said[3] and said[0]["project"] == "p" and said[0]["resume"] == "allow"
    assert said[1] == {"step": 10, "loss": 1.5, "slowest_host/process": 1.0} and said[5] == "finish"


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("init", r"OSError\('no service'\)"),
        ("crash", "its process has ended with code 3"),
        ("hang", "not all is sent yet; its process goes on for up to 1 s"),
    ],
)
def test_wandb_that_fails_is_warned_of_once_and_stops_nothing(
    fault: str, problem: str, wandb_run, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(wandb_log, "CLOSE_S", 0.5)
    monkeypatch.setattr(wandb_log, "END_S", 1.0)
    out = wandb_run(fault)
    channel = SideChannel("Weights & Biases", lambda: WandbLog(out, "p", {}))
    for step in (1, 2, 3):
        channel.call(lambda log, step=step: log.write({"step": step, "loss": 1.5}))
    channel.close(60)
    (warning,) = caplog.messages
    assert re.match(rf"Weights & Biases cannot be written \({problem}\); training goes on", warning)


START_AND_DIE = """
    import json, os, subprocess, sys
    program, out = sys.argv[1:]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-P", program], **pipes)
    init = {"project": "p", "name": "n", "id": "i", "resume": "allow", "dir": out}
    start = {"init": init, "argv": [], "parent": os.getpid(), "end_s": 0.5}
    process.stdin.write(json.dumps(start) + chr(10))
    process.stdin.flush()
    assert process.stdout.readline().strip() == "null"
    print(process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_wandb_that_hangs_ends_after_a_run_that_was_killed(wandb_run) -> None:
    out, program = wandb_run("hang"), Path(wandb_log.__file__).with_name("wandb_process.py")
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(START_AND_DIE), str(program), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert killed.returncode == -9
    limit = time.monotonic() + 60
    while Path(f"/proc/{int(killed.stdout)}").exists():
        assert time.monotonic() < limit, "it stays"
        time.sleep(0.1)


@pytest.mark.parametrize("steps", ["10", "0:3", "5:4", "a:b", ""])
def test_steps_to_trace_are_two_numbers(steps: str) -> None:
    with pytest.raises(ConfigError, match="RunConfig.profile_steps is .* it must be FIRST:LAST"):
        RunConfig(out="x", profile_steps=steps)
    assert RunConfig(out="x", profile_steps="10:13").profiled == (10, 13)


@pytest.mark.slow
def test_a_trace_of_some_steps(experiment, tmp_path) -> None:
    out = tmp_path / "run"
    loop.train(experiment(out, stage={"steps": 3}, profile_steps="2:3"), quiet=True)
    assert list((out / "traces").glob("plugins/profile/*/*.xplane.pb"))
    assert [event["folder"] for event in read_log(out) if event["event"] == "trace"] == [str(out / "traces")]
