"""launch/local_multiproc.sh runs two processes; every script of launch/ can be called."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
LOCAL = LAUNCH / "local_multiproc.sh"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_it_can_be_called(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.fixture
def environment(cpu_environment, free_port) -> Callable[[], dict[str, str]]:
    """`environment()`: variables for the launcher, with a free port."""
    return lambda: os.environ | cpu_environment | {"PORT": str(free_port())}


def steps_in(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_train_stop_and_resume(config: Path, environment, pause) -> None:
    """SIGTERM to the launcher stops both at one saved step; the same command resumes after it."""
    command, out = [LOCAL, "2", config], config.parent / "run"
    pause(0.5)  # the signal arrives long before the last step
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 240
    while len(steps_in(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    stops = re.findall(r"stopped after step (\d+), which is saved", output)
    assert len(stops) == 2 and len(set(stops)) == 1, output
    assert 3 <= int(stops[0])

    pause(0)
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert steps_in(out) == list(range(1, 31))
    assert (out / "model" / "config.json").exists()


def num_gpus() -> int:
    """Without jax, which must not take the memory of the GPUs here."""
    if shutil.which("nvidia-smi") is None:
        return 0
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")


def process_of_rank(launcher: int, rank: int) -> int:
    """Process ID of a rank that the launcher has started."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # of processes that end just now
            if f"PPid:\t{launcher}\n" in (process / "status").read_text():
                if f"PROCESS_ID={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    return int(process.name)
    raise AssertionError(f"no process of rank {rank}")


ON_GPUS = pytest.param(
    {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}, id="gpu",
    marks=[pytest.mark.gpu, pytest.mark.skipif(num_gpus() < 2, reason="needs a GPU")],
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.multihost
@pytest.mark.parametrize("variables", [pytest.param({}, id="cpu"), ON_GPUS])
def test_kill_9_ends_the_launcher_and_the_run_resumes(
    config: Path, environment, pause, variables: dict[str, str], tmp_path: Path
) -> None:
    """On two GPUs: pytest -m gpu tests/launch/test_local.py."""
    out = tmp_path / "run"
    command = [LOCAL, "2", config, "--run.out", out, "--run.save-every", "10"]
    log = (tmp_path / "log").open("w+")
    pause(0.3)
    with subprocess.Popen(command, env=environment() | variables, stdout=log, stderr=log) as launcher:
        deadline = time.monotonic() + 240
        while not steps_in(out) or steps_in(out)[-1] < 15:
            assert launcher.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.05)
        os.kill(process_of_rank(launcher.pid, 1), signal.SIGKILL)
        begin = time.monotonic()
        assert launcher.wait(60) == 128 + signal.SIGKILL
        seconds = time.monotonic() - begin
    output = Path(log.name).read_text()
    assert seconds < 15, output
    assert re.search(r"crosslmm: error: process 1 on host \S+: gone: it was killed", output), output

    pause(0)
    result = subprocess.run(
        command, env=environment() | variables, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    assert steps_in(out) == list(range(1, 31)) and "resumes after step" in result.stderr
    for noise in ("Traceback", "crosslmm: error", "refused", "WatchTasks", "heartbeat"):
        assert noise not in result.stderr, result.stderr


@pytest.mark.multihost
def test_one_process_that_fails_ends_all(tmp_path: Path, environment) -> None:
    """The second fails at once; the first would run for a minute."""
    script = tmp_path / "python"
    script.write_text(
        "#!/usr/bin/env bash\n[[ $2 == crosslmm_jax.parallel.xla_flags ]] && exit\n"
        "((PROCESS_ID == 0)) || exit 3\nexec sleep 60\n"
    )
    script.chmod(0o755)
    start = time.monotonic()
    settings = environment() | {"PYTHON": str(script)}
    result = subprocess.run([LOCAL, "2", "x.py"], env=settings, timeout=50)
    assert result.returncode == 3
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("words", [["2"], ["0", "x.py"], ["two", "x.py"]])
def test_the_local_launcher_says_how_it_is_called(words: list[str]) -> None:
    result = subprocess.run([LOCAL, *words], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")
