"""launch/slurm.sbatch, with programs in place of SLURM's; `test_real_slurm.py` has the real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHOW_PLACE = """
    [[ $2 == crosslmm_jax.parallel.xla_flags ]] && exit
    echo "$COORDINATOR_ADDRESS $NUM_PROCESSES $PROCESS_ID ${CUDA_VISIBLE_DEVICES:-} $*"
"""
TASK = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-99999]",
    "SLURM_LOCALID": "1", "SLURM_GTIDS": "4,5", "SLURMD_NODENAME": "n3",
}  # fmt: skip


def run_task(launch: Path, fake_program, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    python = fake_program("python", SHOW_PLACE)
    # More than a pipe holds: scontrol must not fail because nobody reads it to the end.
    fake_program("scontrol", '[[ $* == "show hostnames n[1-99999]" ]] && seq -f n%.f 99999\n')
    names = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [launch / "_env.sh", "train", "a config.py"], capture_output=True, text=True,
        env=names | {"PYTHON": str(python)} | environ,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (TASK, "n1:61447 16 5 "),
        (TASK | {"COORDINATOR_ADDRESS": "n1:4000"}, "n1:4000 16 5 "),
        ({"COORDINATOR_ADDRESS": "x:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}, "x:1 2 1 "),
    ],
    ids=["srun", "slurm.sbatch", "set"],
)
def test_a_process_finds_its_place(launch: Path, fake_program, environ: dict[str, str], place: str) -> None:
    result = run_task(launch, fake_program, environ)
    assert result.stdout == f"{place} -m crosslmm_jax.cli train a config.py\n", result.stderr


@pytest.mark.parametrize(
    ("tasks", "visible", "on_node", "chosen"),
    [
        ("4,5", "0,1,2,3", 4, "2,3"),
        ("4,5", "GPU-a,GPU-b", 2, "GPU-b"),
        ("4,5", "", 2, "1"),
        ("5", "0,1,2,3", 4, "0,1,2,3"),  # one task per node has them all
        ("4,5,6,7", "2", 4, "2"),  # SLURM has bound each task to its own
    ],
)
def test_gpus_are_shared_by_the_tasks_of_a_node(
    launch: Path, fake_program, tasks: str, visible: str, on_node: int, chosen: str
) -> None:
    environ = {"SLURM_GTIDS": tasks, "CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": str(on_node)}
    result = run_task(launch, fake_program, TASK | environ)
    assert result.stdout.split()[3] == chosen, result.stderr


def test_gpus_that_cannot_be_shared_evenly_are_refused(launch: Path, fake_program) -> None:
    environ = {"SLURM_GTIDS": "4,5,6", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}
    result = run_task(launch, fake_program, TASK | environ)
    assert result.returncode == 2
    assert result.stderr == (
        "crosslmm: error: node n3 has 3 tasks for 4 GPU(s), which they cannot share evenly; set"
        " --ntasks-per-node to 1 or to the number of GPUs per node\n"
    )


@pytest.fixture
def job(launch: Path, fake_program, tmp_path: Path):
    """`job(code, saves=step)`: the next start of a job, whose tasks save and end with `code`.

    Returns the result, and what SLURM was asked for. `run.out` is runs/x.
    """
    requests, checkpoints = tmp_path / "requests", tmp_path / "runs" / "x" / "checkpoints"
    shown = (
        f"JobId=7 JobState=${{STATE:-RUNNING}}\\n   Command={launch}/slurm.sbatch tiny.py --run.out runs/x\\n"
    )
    fake_program("scontrol", f'[[ $1 == show ]] && printf "{shown}" || echo "$@" >>"{requests}"\n')
    fake_program(
        "srun",
        """
        [[ $1 == --overlap ]] && exit "${ANSWER:-0}"
        for word; do [[ $word == --output=* ]] && log=${word#--output=}; done
        echo "crosslmm: at $COORDINATOR_ADDRESS" >"${log/\\%t/0}"
        exit "$CODE"
        """,
    )
    # Reading a config takes seconds, which one test below spends.
    python = fake_program(
        "python", f'[[ $1 == */_run_out.py ]] && echo runs/x || exec {sys.executable} -S "$@"\n'
    )
    starts = 0

    def start(code: int, *, saves: int | None = None, **more: str) -> tuple[subprocess.CompletedProcess, str]:
        nonlocal starts
        environ = {
            "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1", "SLURM_RESTART_COUNT": str(starts),
            "PYTHON": str(python), "CODE": str(code),
        }  # fmt: skip
        starts += 1
        requests.unlink(missing_ok=True)
        if saves is not None:
            (checkpoints / str(saves)).mkdir(parents=True)
            (checkpoints / f"{saves + 1}.orbax-checkpoint-tmp").mkdir()
        result = subprocess.run(
            ["bash", launch / "slurm.sbatch", "tiny.py"], cwd=tmp_path, env=os.environ | environ | more,
            capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        return result, requests.read_text() if requests.exists() else ""

    return start


def test_a_job_is_queued_again_only_after_a_saved_stop(job, tmp_path: Path) -> None:
    done, requests = job(130, saves=8)
    assert (done.returncode, requests) == (130, "requeue 7\n"), done.stderr
    assert "start 0 after step 8 on n1" in done.stderr and "stopped and saved at step 8" in done.stderr
    address = (tmp_path / "crosslmm_7" / "start_0" / "task_0.log").read_text().split()[-1]
    assert 0 < int(address.removeprefix("n1:")) < 65536
    for code in (2, 75, 137, 143):
        done, requests = job(code, saves=8 + code)
        assert (done.returncode, requests) == (code, ""), done.stderr
        assert f"the job is not queued again; the same command resumes after step {8 + code}" in done.stderr
    done, requests = job(130, STATE="CANCELLED")
    assert (done.returncode, requests) == (130, ""), done.stderr
    assert job(0)[0].returncode == 0


def test_a_job_that_has_lost_a_node_leaves_the_restart_to_slurm(job) -> None:
    """Until SLURM takes it, or for a bounded time."""
    for code, waits in ((75, True), (137, True), (2, False)):
        done, requests = job(code, ANSWER="1", NODE_LOSS_S="0")
        assert (done.returncode, requests) == (code, "")
        assert ("a node of n1 does not answer" in done.stderr) == waits
    assert "does not answer" not in job(75)[0].stderr


def test_restarts_without_progress_come_to_an_end(job) -> None:
    for _ in range(2):
        assert job(130, MAX_IDLE_RESTARTS="1")[1] == "requeue 7\n"
    done, requests = job(130, MAX_IDLE_RESTARTS="1")
    assert (done.returncode, requests) == (1, "")
    assert "error: 1 restarts in a row saved nothing after step 0" in done.stderr


def test_a_wrong_command_is_refused_before_any_task_starts(job, tmp_path: Path) -> None:
    done, requests = job(0, PYTHON=sys.executable)
    assert (done.returncode, requests) == (2, "")
    assert done.stderr.startswith("crosslmm: error: tiny.py: no such config file")
    assert not (tmp_path / "crosslmm_7").exists()
