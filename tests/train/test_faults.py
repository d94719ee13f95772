"""Two processes of one run, and a fault from outside: all end in time, with one right line and code.

Each case takes 10 to 110 s on two busy cores. Three are `slow`, the others `nightly`.
With CROSSLMM_FAULTS_TABLE=docs/results/faults_two_processes.md and -m "slow or nightly" this file writes the
table of what was measured.
"""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import crosslmm_jax
from crosslmm_jax.config import WatchdogConfig
from crosslmm_jax.train.reporting.metrics_log import read_metrics

pytestmark = [pytest.mark.multihost]
PACKAGE = Path(crosslmm_jax.__file__).parent
HOST = os.uname().nodename
LINE = re.compile(r"^crosslmm: .*$", re.MULTILINE)
LIMIT_S = 30.0
SILENCE_S = 6.0
MEASURED: list[tuple[str, list[float], list[int], str]] = []


class Run:
    """Two processes that train in one folder, until something happens to them."""

    def __init__(self, config: str, out: Path, environment: dict[str, str]) -> None:
        self.config, self.out, self.environment = config, out, environment
        self.processes: list[subprocess.Popen] = []

    def start(
        self, *words: str, index: int | None = None, before: list[str] | None = None, **variables: str
    ) -> None:
        """`before`: a command that runs the process, in its place."""
        for each in (0, 1) if index is None else (index,):
            command = [
                *(before or []),
                sys.executable,
                "-m",
                "crosslmm_jax.cli",
                "train",
                self.config,
                *words,
            ]
            with self._log(each).open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        command, env=self.environment | {"PROCESS_ID": str(each)} | variables,
                        stdout=log, stderr=subprocess.STDOUT, cwd=self.out.parent,
                    )
                )  # fmt: skip

    def _log(self, index: int) -> Path:
        return self.out.with_name(f"{self.out.name}.{index}.log")

    def output(self, index: int) -> str:
        return self._log(index).read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + 240
        while not condition():
            alive = all(process.poll() is None for process in self.processes)
            assert alive and time.monotonic() < limit, self.output(0) + self.output(1)
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: any(line["step"] >= step for line in read_metrics(self.out)))

    def signal(self, index: int, number: int) -> None:
        os.kill(self.processes[index].pid, number)

    def ends(self, name: str, codes: list[int], line: str, *, within: float = LIMIT_S) -> None:
        """Checks how the processes end after the fault `name`, which has just happened; notes it down.

        Args:
          name: of the fault.
          codes: exit code of each process that was started.
          line: pattern of the one line of every process that was not killed.
          within: seconds.
        """
        begin, seconds = time.monotonic(), [0.0] * len(self.processes)
        while any(process.poll() is None for process in self.processes):
            assert time.monotonic() - begin < within, f"{name}: {self.output(0)}{self.output(1)}"
            time.sleep(0.02)
            for index, process in enumerate(self.processes):
                if process.poll() is None:
                    seconds[index] = time.monotonic() - begin
        found = [process.returncode for process in self.processes]
        outputs = [self.output(index) for index in range(len(codes))]
        assert found == codes, outputs
        said = ""
        for code, output in zip(codes, outputs, strict=True):
            if code >= 0:
                (said,) = LINE.findall(output)
                assert re.search(line, said), output
        said = re.sub(r"/\S*/files\d+/data/", "DATA/", said.replace(str(self.out), "RUN"))
        MEASURED.append((name, seconds, found, said))
        self.processes.clear()


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    if path := os.environ.get("CROSSLMM_FAULTS_TABLE"):
        present = Path(path).read_text().splitlines() if Path(path).exists() else []
        Path(path).write_text(table_of_measured(present))


def table_of_measured(present: list[str]) -> str:
    """The table `present` with the faults that were measured now added or replaced."""
    rows = {line.split(" | ")[0][2:]: line for line in present if re.match(r"\| .* \| .*\d \| ", line)}
    for name, seconds, codes, said in MEASURED:
        times = ", ".join(f"{each:.1f}" for each in seconds)
        rows[name] = f"| {name} | {times} | {', '.join(map(str, codes))} | {said} |"
    return "\n".join(
        [
            "# Faults in one of two processes", "",
            "Measured by `tests/train/test_faults.py` on 2 CPU cores: seconds from the fault until each of"
            " the processes had ended, exit codes (negative: killed by that signal), and the line they print."
            f" `run.watchdog.silence_s` was {SILENCE_S:g}; other bounds are in the lines.", "",
            "| fault | seconds | codes | line |", "|---|---|---|---|", *rows.values(), "",
        ]
    )  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Compiled programs, which all runs here share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def make_run(experiment, config_file, one_device_flags, shared, free_port, tmp_path) -> Iterator[Callable]:
    """`make_run(out, **fields)`: a run of two processes that only a fault ends; fields of RunConfig."""
    runs: list[Run] = []

    def make(out: Path | None = None, *, limits: dict[str, float] | None = None, **fields) -> Run:
        watchdog = WatchdogConfig(**({"silence_s": SILENCE_S} | (limits or {})))
        out = out or tmp_path / "run"
        config = experiment(
            out, stage={"steps": 100_000}, log_every=1,
            **({"save_every": 1_000_000, "watchdog": watchdog} | fields),
        )  # fmt: skip
        environment = os.environ | {
            "XLA_FLAGS": one_device_flags, "JAX_COMPILATION_CACHE_DIR": str(shared),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "PYTHONPATH": str(PACKAGE.parent),
            "COORDINATOR_ADDRESS": f"localhost:{free_port()}", "NUM_PROCESSES": "2",
        }  # fmt: skip
        runs.append(Run(config_file(config), out, environment))
        return runs[-1]

    yield make
    for run in runs:
        for process in run.processes:
            process.kill()
            process.wait()


def gone(process: int) -> str:
    return f"error: process {process} on host {HOST}: gone: it was killed"


# ---- a process that is lost ----


@pytest.mark.parametrize(
    "victim", [pytest.param(0, marks=pytest.mark.nightly), pytest.param(1, marks=pytest.mark.slow)]
)
def test_kill_9(make_run, victim: int) -> None:
    run = make_run()
    run.start()
    run.wait_for_step(2)
    run.signal(victim, signal.SIGKILL)
    run.ends(f"kill -9 of process {victim}", [-9 if i == victim else 75 for i in (0, 1)], gone(victim))


@pytest.mark.nightly
def test_a_stopped_process(make_run) -> None:
    run = make_run()
    run.start()
    run.wait_for_step(2)
    run.signal(1, signal.SIGSTOP)
    process = run.processes[0]
    begin = time.monotonic()
    process.wait(SILENCE_S + LIMIT_S)
    assert SILENCE_S / 2 < time.monotonic() - begin
    run.signal(1, signal.SIGCONT)
    run.ends(
        "SIGSTOP of process 1, until process 0 has ended", [75, 75], "process 1 .* no sign of life for 6 s"
    )


@pytest.mark.nightly
def test_a_rank_that_does_not_come_in_time(make_run) -> None:
    run = make_run(limits={"start_s": 5})
    run.start(index=0)
    run.ends("process 1 is not started", [75], "process 0 .*: process 1 of 2 did not start within 5 s")
    run.start(index=1)
    run.processes.insert(0, run.processes[0])  # it has the second log
    run.processes[0].wait(60)
    (said,) = LINE.findall(run.output(1))
    assert run.processes[0].returncode == 75
    assert re.search(r"process 1 .*: process 0 at localhost:\d+ did not start within 5 s", said)


# ---- an error of one process ----


@pytest.mark.slow
def test_different_code_on_one(make_run, tmp_path) -> None:
    other = tmp_path / "other" / PACKAGE.name
    shutil.copytree(PACKAGE, other, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "train" / "step.py").open("a") as file:
        file.write("# changed\n")
    run = make_run()
    run.start(index=0)
    run.start(index=1, PYTHONPATH=str(other.parent))
    run.ends(
        "another file of the package on process 1 (from the start)", [2, 2],
        f"process 1 on host {HOST}: its code is not that of process 0: crosslmm_jax/train/step.py",
        within=60,
    )  # fmt: skip
    assert not run.out.exists()


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "variable", "value", "line"),
    [
        (
            "NUM_PROCESSES is 3 on process 1, and 2 on process 0 (from the start)", "NUM_PROCESSES", "3",
            "process 1 .* its NUM_PROCESSES is 3, and that of process 0 is 2; give all hosts the same",
        ),
        (
            "both processes have PROCESS_ID 0 (from the start)", "PROCESS_ID", "0",
            "PROCESS_ID is 0 here, and for another process on host .*; give each of the 2 processes its own",
        ),
    ],
)  # fmt: skip
def test_places_that_do_not_fit(make_run, name: str, variable: str, value: str, line: str) -> None:
    run = make_run()
    run.start(index=0)
    run.start(index=1, **{variable: value})
    run.ends(name, [2, 2], line, within=60)


@pytest.mark.nightly
def test_a_full_disk(make_run, mount_disk, fill) -> None:
    disk = mount_disk(kilobytes=16_000)
    run = make_run(disk / "run", save_every=3)
    run.start()
    run.wait_for_step(4)
    fill(disk)
    run.ends("the disk of the checkpoints is full", [2, 2], "a checkpoint was not written .No space left")


@pytest.mark.nightly
def test_a_checkpoint_that_fails_on_one(make_run) -> None:
    """Its limit of the size of files is lowered, so that writing in the background fails."""
    run = make_run(save_every=10)
    run.start("--mesh.data", "1", "--mesh.fsdp", "2")  # so that each writes a part
    run.wait_for_step(2)
    limit = 8192  # bytes; more than its log takes
    resource.prlimit(run.processes[1].pid, resource.RLIMIT_FSIZE, (limit, limit))
    run.wait_for_step(10)
    run.ends(
        "process 1 cannot write its part of a checkpoint, in the background", [2, 2],
        f"process 1 on host {HOST}: {run.out}/checkpoints: a checkpoint was not written .File too large",
    )  # fmt: skip


def with_mount(words: str) -> list[str]:
    """What runs a command that alone sees what `mount WORDS` mounts."""
    mount = ["unshare", "--mount", "sh", "-c", f'mount {words} && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    return mount


@pytest.mark.nightly
def test_a_disk_that_is_full_on_one(make_run, tmp_path) -> None:
    """What it writes of a checkpoint goes to a disk of its own, which is too small."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    run = make_run(save_every=10)
    words = ("--mesh.data", "1", "--mesh.fsdp", "2")  # so that each writes a part
    run.start(*words, index=0)
    run.start(*words, index=1, before=with_mount(f"-t tmpfs -o size=16k none {folder}"))
    run.wait_for_step(10)
    run.ends(
        "the disk of process 1 is full", [2, 2],
        f"process 1 on host {HOST}: {folder}: a checkpoint was not written .No space left on device",
    )  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "mount", "line"),
    [
        (
            "process 1 finds no media (from the start)", "-t tmpfs -o size=64k none {}",
            r"train.json: row \d+ .*{}/train_0000\d.mp4: no such file; .* are the media where the index says",
        ),
        (
            "process 1 cannot read one of four videos (from the start)",
            "--bind /dev/null {}/train_00001.mp4",
            r"\d+ of 200 rows could not be read .\d+ not_a_file.*max_bad_fraction 0.05;"
            r" .*row \d+ .*{}/train_00001.mp4",
        ),
    ],
)  # fmt: skip
def test_media_that_one_cannot_read(make_run, files, name: str, mount: str, line: str) -> None:
    """It replaces damaged rows by others, up to `max_bad_fraction`."""
    videos = files / "data" / "videos"
    run = make_run()
    run.start(index=0)
    run.start(index=1, before=with_mount(mount.format(videos)))
    pattern = f"process 1 on host {HOST}: .*{line.replace('{}', str(videos))}"
    run.ends(name, [2, 2], pattern, within=240)


@pytest.mark.nightly
def test_a_run_folder_that_is_not_shared(make_run, tmp_path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    run = make_run(folder / "run")
    run.start(index=0)
    run.start(index=1, before=with_mount(f"-t tmpfs -o size=16m none {folder}"))
    run.ends(
        "run.out of process 1 is another folder (from the start; it looks for 60 s)", [2, 2],
        f"process 1 on host {HOST}: run.out {run.out}: this host does not see what process 0 writes there",
        within=150,
    )  # fmt: skip


# ---- alive, but stuck ----


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that decode for `process`."""
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [pid for path in threads for pid in path.read_text().split()]
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.nightly
def test_kill_9_of_a_process_with_workers(make_run) -> None:
    run = make_run()
    run.start("--data.num-workers", "1", "--data.frame-cache-mb", "0")
    run.wait_for_step(2)
    workers = workers_of(run.processes[1])
    assert workers
    run.signal(1, signal.SIGKILL)
    run.ends("kill -9 of process 1, which has a decoding process", [75, -9], gone(1))
    limit = time.monotonic() + LIMIT_S
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < limit, "orphans"
        time.sleep(0.1)


@pytest.mark.nightly
def test_a_process_that_waits_for_ever(make_run) -> None:
    run = make_run(limits={"input_wait_s": 4, "step_s": 60})
    run.start("--data.num-workers", "1", "--data.prefetch", "1", "--data.frame-cache-mb", "0")
    run.wait_for_step(2)
    workers = workers_of(run.processes[1])
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        run.ends(
            "the decoding process of process 1 is stopped", [75, 75],
            r"process 1 .*: input_wait of step \d+ has taken over 4 s .run.watchdog.input_wait_s",
        )  # fmt: skip
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for index in (0, 1):
        stacks = (run.out / "stacks" / f"process_{index}.txt").read_text()
        assert "Thread 0x" in stacks and "loop.py" in stacks


# ---- SIGTERM ----


@pytest.mark.slow
def test_sigterm_during_compilation(make_run) -> None:
    run = make_run()
    run.start()
    run.wait_until(lambda: "compiling the training step" in run.output(0))
    run.signal(1, signal.SIGTERM)
    run.ends("SIGTERM to process 1 during compilation", [130, 130], "stopped before the first step")


@pytest.mark.nightly
def test_sigterm_between_steps(make_run) -> None:
    run = make_run()
    run.start()
    run.wait_for_step(3)
    run.signal(1, signal.SIGTERM)
    run.ends("SIGTERM to process 1 between steps", [130, 130], r"stopped after step \d+, which is saved")


@pytest.mark.nightly
def test_sigterm_during_validation(make_run) -> None:
    run = make_run()
    run.start("--data.validation.share", "0.5", "--data.validation.every", "1")  # most of the time
    run.wait_until(lambda: any("validation" in line for line in read_metrics(run.out)))
    run.signal(1, signal.SIGTERM)
    run.ends("SIGTERM to process 1 during validation", [130, 130], r"stopped after step \d+, which is saved")


@pytest.mark.nightly
def test_sigterm_during_a_save(make_run) -> None:
    run = make_run(save_every=5)
    run.start()
    run.wait_until(lambda: any(run.out.glob("checkpoints/*orbax-checkpoint-tmp*")))
    run.signal(1, signal.SIGTERM)
    run.ends("SIGTERM to process 1 during a save", [130, 130], r"stopped after step \d+, which is saved")
