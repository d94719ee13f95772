"""launch/slurm.sbatch with a real SLURM: its daemons run here as four nodes. Minutes; needs root.

Jobs train on the CPU, with one process on each of two nodes. Whatever happens to a run, it ends with the
weights of one that nothing happened to.
"""

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nightly, pytest.mark.multihost]

NODES = ("n1", "n2", "n3", "n4")
# config_overrides: nodes have what this file says. The GPUs are devices that nothing opens.
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SlurmdTimeout=30
KillWait=10
MinJobAge=3600
GresTypes=gpu
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17004] CPUs=4 RealMemory=16000 Gres=gpu:4
PartitionName=all Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP
"""
STEPS = 60
START_S = 300  # from the submission to the first steps: imports and compilation, twice at a time


class Cluster:
    """A SLURM on this machine, and the runs of one config in it."""

    def __init__(self, folder: Path, launch: Path, config: Path, environ: dict[str, str]) -> None:
        self.folder, self.launch, self.config = folder, launch, config
        self.runs = folder / "runs"
        self.runs.mkdir()
        self.environ = os.environ | environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environ.pop("PYTHONPATH", None)  # the launcher finds the repository by itself
        for name in ("state", "gpus", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        for gpu in range(4):
            os.mknod(folder / "gpus" / f"gpu{gpu}", stat.S_IFCHR, os.makedev(1, 3))  # as /dev/null
        text = CONFIGURATION.format(host=os.uname().nodename, folder=folder)
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu File={folder}/gpus/gpu[0-3]\n")

    def __enter__(self) -> "Cluster":
        if subprocess.run(["pgrep", "-x", "munged"], capture_output=True).returncode:
            for path, mode in (("/run/munge", "755"), ("/var/log/munge", "700"), ("/var/lib/munge", "700")):
                subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", "-m", mode, path], check=True)
            subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "/usr/sbin/munged"], check=True)
        subprocess.run(["slurmctld", "-c"], env=self.environ, check=True)
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "4", 60, "nodes")
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.ask("scancel", "--user", getpass.getuser())
            wait_until(lambda: not self.ask("squeue", "-h"), 60, "the end of all jobs")
        for path in self.folder.glob("slurm*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)

    def start_node(self, node: str) -> None:
        subprocess.run(["slurmd", "-N", node], env=self.environ, check=True)

    def ask(self, *words: str) -> str:
        return subprocess.run(
            words, env=self.environ, cwd=self.runs, check=True, capture_output=True, text=True
        ).stdout

    def submit(self, run: str, *words: str, options: tuple[str, ...] = (), **variables: str) -> "Job":
        """A job on two nodes, from a folder that is not the repository's."""
        sbatch = [
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0",
            "--cpus-per-task=1", "--time=60", *options, str(self.launch / "slurm.sbatch"),
            os.path.relpath(self.config, self.runs), "--run.out", run, "--stage.steps", str(STEPS), *words,
        ]  # fmt: skip
        done = subprocess.run(
            sbatch, env=self.environ | variables, cwd=self.runs, check=True, capture_output=True, text=True
        )
        return Job(self, done.stdout.strip(), run)

    def weights(self, run: str) -> bytes:
        return (self.runs / run / "model" / "model.safetensors").read_bytes()


class Job:
    """A job, by its number."""

    def __init__(self, cluster: Cluster, number: str, run: str) -> None:
        self.cluster, self.number, self.run = cluster, number, cluster.runs / run

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", self.cluster.ask("scontrol", "show", "job", self.number))
        assert found is not None, name
        return found[1]

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def log(self) -> str:
        return (self.cluster.runs / f"crosslmm_{self.number}.log").read_text()

    def task_log(self, task: int, start: int = 0) -> str:
        path = self.cluster.runs / f"crosslmm_{self.number}" / f"start_{start}" / f"task_{task}.log"
        return path.read_text()

    def last_step(self) -> int:
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for_steps(self, count: int) -> None:
        """Returns after so many steps more."""
        wanted = self.last_step() + count

        def done() -> bool:
            assert self.state in ("PENDING", "RUNNING"), self.log
            return self.last_step() >= wanted

        wait_until(done, START_S, f"step {wanted} of job {self.number}")

    def wait_for_end(self, seconds: float, *, state: str) -> float:
        """Seconds until no process of the job is left."""
        begin = time.monotonic()
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.state in ends, seconds, f"the end of job {self.number}")
        assert self.state == state, self.log
        wait_until(lambda: not self.processes(), seconds, f"processes of job {self.number}")
        return round(time.monotonic() - begin, 1)

    def wait_for_restart(self, restarts: int, seconds: float) -> float:
        """Seconds until the job is in the queue again; then lets it start without SLURM's two minutes."""
        begin = time.monotonic()
        wait_until(
            lambda: self.field("Restarts") == str(restarts) and self.state == "PENDING", seconds,
            f"restart {restarts} of job {self.number}",
        )  # fmt: skip
        waited = round(time.monotonic() - begin, 1)
        self.cluster.ask("scontrol", "update", f"JobId={self.number}", "StartTime=now", "TimeLimit=60")
        return waited

    def processes(self, node: str = "") -> list[int]:
        """Processes that train, on all nodes of the job or one."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                environ = (process / "environ").read_bytes().split(b"\0")
                words = (process / "cmdline").read_bytes()
                wanted = {f"SLURM_JOB_ID={self.number}".encode()}
                wanted |= {f"SLURMD_NODENAME={node}".encode()} if node else set()
                if wanted <= set(environ) and b"crosslmm_jax.cli" in words:
                    found.append(int(process.name))
        return found


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, launch: Path, config: Path, cpu_environment: dict[str, str]
) -> Iterator[Cluster]:
    if os.geteuid() != 0 or shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        pytest.skip("needs SLURM and root")
    hosts = Path("/etc/hosts")
    before = hosts.read_text()
    hosts.write_text(f"{before.rstrip()}\n127.0.0.1 {' '.join(NODES)}\n")
    try:
        with Cluster(tmp_path_factory.mktemp("slurm"), launch, config, cpu_environment) as cluster:
            yield cluster
    finally:
        hosts.write_text(before)


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> bytes:
    """The weights of a run that nothing happened to."""
    job = cluster.submit("reference", options=("--job-name=reference",))
    job.wait_for_end(START_S, state="COMPLETED")
    assert "start 0 after step 0 on n[1-2]" in job.log
    assert "a MODEL folder, trained for" in job.task_log(0)
    assert "a MODEL folder" not in job.task_log(1)
    return cluster.weights("reference")


def test_a_stopped_job_resumes_until_it_is_stopped_for_good(
    cluster: Cluster, expected: bytes, pause, record_property
) -> None:
    """By `scancel --signal`, before the time limit, and then without a further start."""
    pause(2)
    job = cluster.submit("stopped")
    job.wait_for_steps(3)
    second = cluster.submit("stopped")
    record_property("second_job_refused_s", second.wait_for_end(START_S, state="FAILED"))
    assert second.field("ExitCode") == "2:0"
    assert "is training in this folder" in second.log and "not queued again" in second.log

    cluster.ask("scancel", "--signal=TERM", job.number)
    record_property("signal_to_requeue_s", job.wait_for_restart(1, 120))
    assert re.search(r"stopped and saved at step \d+; the job is queued again", job.log)
    assert "which is saved" in job.task_log(0)
    job.wait_for_steps(2)
    minutes = int(job.field("RunTime").split(":")[1]) + 2
    cluster.ask("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    record_property("limit_to_requeue_s", job.wait_for_restart(2, 240))
    job.wait_for_steps(2)
    cluster.ask("scontrol", "update", f"JobId={job.number}", "Requeue=0")
    cluster.ask("scancel", "--signal=TERM", job.number)
    record_property("signal_to_end_s", job.wait_for_end(120, state="FAILED"))
    assert "SLURM refuses; submit the same command to resume" in job.log
    assert "which is saved" in job.task_log(0, start=2)

    pause(0)
    last = cluster.submit("stopped")
    last.wait_for_end(START_S, state="COMPLETED")
    assert not re.search(r"start 0 after step 0 ", last.log)
    assert cluster.weights("stopped") == expected


def job_after_a_save(cluster: Cluster, out: str) -> tuple[Job, int]:
    """A job that has saved step 5 and goes on, and the ID of its process on node n2."""
    job = cluster.submit(out, "--run.save-every", "5")
    job.wait_for_steps(7)
    (process,) = job.processes("n2")
    return job, process


def test_a_killed_task_ends_the_job_and_the_same_command_resumes(
    cluster: Cluster, expected: bytes, pause, record_property
) -> None:
    pause(0.5)
    job, process = job_after_a_save(cluster, "killed")
    os.kill(process, signal.SIGKILL)
    record_property("killed_task_to_end_s", job.wait_for_end(120, state="FAILED"))
    assert job.field("Restarts") == "0" and "the job is not queued again" in job.log
    pause(0)
    resumed = cluster.submit("killed", "--run.save-every", "5")
    resumed.wait_for_end(START_S, state="COMPLETED")
    assert "start 0 after step 5 on" in resumed.log
    assert cluster.weights("killed") == expected


def test_a_lost_node_moves_the_job_to_others(
    cluster: Cluster, expected: bytes, pause, record_property
) -> None:
    pause(0.5)
    job, process = job_after_a_save(cluster, "lost_node")
    stepd = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    daemon = int((cluster.folder / "slurmd-n2.pid").read_text())
    assert b"slurmstepd" in Path(f"/proc/{stepd}/cmdline").read_bytes()
    for lost in (daemon, stepd, process):
        os.kill(lost, signal.SIGKILL)
    try:
        record_property("lost_node_to_requeue_s", job.wait_for_restart(1, 180))
        pause(0)
        job.wait_for_end(START_S, state="COMPLETED")
    finally:
        cluster.start_node("n2")
    restart = re.search(r"start 1 after step (\d+) on (\S+);", job.log)
    assert restart is not None and int(restart[1]) >= 5 and restart[2] != "n[1-2]", job.log
    assert cluster.weights("lost_node") == expected


def test_a_users_mistake_is_not_started_again(cluster: Cluster, record_property) -> None:
    """One that the tasks find: no process of the two can hold a third of the batch."""
    job = cluster.submit("mistake", "--mesh.data", "3")
    record_property("mistake_to_end_s", job.wait_for_end(START_S, state="FAILED"))
    assert job.field("ExitCode") == "2:0" and job.field("Restarts") == "0"
    assert "MeshConfig data=3" in job.log and "not queued again" in job.log
    assert "MeshConfig data=3" in job.task_log(1)


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, pause, record_property) -> None:
    pause(1)
    job = cluster.submit("cancelled")
    job.wait_for_steps(2)
    cluster.ask("scancel", job.number)
    record_property("cancel_to_end_s", job.wait_for_end(90, state="CANCELLED"))
    time.sleep(5)
    assert (job.state, job.field("Restarts")) == ("CANCELLED", "0")


SHOW = """#!/usr/bin/env bash
[[ $1 == */_hold_port.py ]] && exec {python} "$@"
[[ $1 == */_run_out.py ]] && echo shown && exit
[[ $2 == *xla_flags ]] || echo "$COORDINATOR_ADDRESS $PROCESS_ID of $NUM_PROCESSES: $CUDA_VISIBLE_DEVICES"
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--gpus-per-node=4", "--ntasks-per-node=4"), ["0", "1", "2", "3"]),
        (("--gpus-per-node=4", "--ntasks-per-node=1"), ["0,1,2,3"]),
        (("--gpus-per-node=4", "--gpus-per-task=1", "--ntasks-per-node=4"), ["0", "1", "2", "3"]),
        (("--gpus-per-node=4", "--ntasks-per-node=2"), ["0,1", "2,3"]),
    ],
    ids=["one each", "one task", "bound by SLURM", "two each"],
)
def test_the_tasks_of_a_node_share_its_gpus(
    cluster: Cluster, tmp_path: Path, options: tuple[str, ...], expected: list[str]
) -> None:
    python = tmp_path / "python"
    python.write_text(SHOW.format(python=sys.executable))
    python.chmod(0o755)
    job = cluster.submit("shown", options=options, PYTHON=str(python))
    job.wait_for_end(60, state="COMPLETED")
    count = 2 * len(expected)
    places = [job.task_log(task).strip().rsplit(" ", 1) for task in range(count)]
    address = places[0][0].split(" ")[0]
    assert address.startswith("n1:")
    assert [place for place, _ in places] == [f"{address} {task} of {count}:" for task in range(count)]
    gpus = [gpu for _, gpu in places]
    for node in (gpus[: count // 2], gpus[count // 2 :]):
        assert (sorted(node) if "--gpus-per-task=1" in options else node) == expected
