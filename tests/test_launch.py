"""The launchers: valid for their interpreters; the local one runs two processes."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.demo.tokenizer import write_default_tokenizer

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
LOCAL = LAUNCH / "local_multiproc.sh"
STEPS = 150  # they take seconds longer than a stop needs to reach both processes
TINY = """
    import dataclasses
    from pathlib import Path
    from crosslmm_jax.demo import recipe

    def get_config():
        folder = Path(__file__).parent
        size = dataclasses.replace(recipe.QUICK, batch_size=2, stage1_steps={steps}, log_every=1)
        config = recipe.stage1(folder, out=folder / "run", size=size)
        model = config.model  # as little to compile as shows the same
        vision = dataclasses.replace(model.vision, num_layers=2)
        decoder = dataclasses.replace(model.decoder, num_layers=2)
        model = dataclasses.replace(model, vision=vision, decoder=decoder, attention="reference")
        return dataclasses.replace(config, model=model)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_it_can_be_called(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


def test_the_jobset_starts_every_host_of_its_slice() -> None:
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert (LAUNCH.parent / container["command"][0]).exists()
    assert (LAUNCH.parent / container["command"][2]).exists()
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    assert (
        job["parallelism"]
        == job["completions"]
        == chips // container["resources"]["limits"]["google.com/tpu"]
    )


def fake_interpreter(folder: Path) -> Path:
    """A script in place of python that prints its arguments and the process's place among the others."""
    script = folder / "python"
    script.write_text(
        '#!/usr/bin/env bash\n[[ $2 == crosslmm_jax.parallel.xla_flags ]] && exit\n'
        'echo "$COORDINATOR_ADDRESS $NUM_PROCESSES $PROCESS_ID $*"\n'
    )  # fmt: skip
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2"}, "a:8476 3 2"),
        (
            {
                "SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "7",
                "SLURM_STEP_NODELIST": "n[1-99999]",
            },
            "n1:61447 16 5",
        ),
        ({"COORDINATOR_ADDRESS": "x:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}, "x:1 2 1"),
    ],
    ids=["gke", "slurm", "set"],
)  # fmt: skip
def test_a_process_finds_its_place(tmp_path: Path, environ: dict[str, str], place: str) -> None:
    python = fake_interpreter(tmp_path)
    scontrol = tmp_path / "scontrol"
    # More than a pipe holds: scontrol must not fail because nobody reads it to the end.
    scontrol.write_text('#!/usr/bin/env bash\n[[ $* == "show hostnames n[1-99999]" ]] && seq -f n%.f 99999\n')
    scontrol.chmod(0o755)
    result = subprocess.run(
        [LAUNCH / "_env.sh", "train", "a config.py"], capture_output=True, text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python)} | environ,
    )  # fmt: skip
    assert result.stdout == f"{place} -m crosslmm_jax.cli train a config.py\n", result.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    write_dataset(folder / "data", num_train=4, num_heldout=4, seed=0)
    write_default_tokenizer(folder / "tokenizer")
    build_index(
        str(folder / "data" / "captions.json"), folder / "index" / "captions",
        tokenizer=str(folder / "tokenizer"), quiet=True,
    )  # fmt: skip
    (folder / "tiny.py").write_text(textwrap.dedent(TINY.format(steps=STEPS)))
    return folder / "tiny.py"


@pytest.fixture
def environment(one_device_flags: str, free_port) -> Callable[[], dict[str, str]]:
    """`environment()`: variables for the launcher, with a free port."""
    settings = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device_flags}
    return lambda: os.environ | settings | {"PORT": str(free_port())}


def steps_in(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_train_stop_and_resume(config: Path, environment) -> None:
    """SIGTERM to the launcher stops both at one saved step; the same command resumes after it."""
    command, out = [LOCAL, "2", config], config.parent / "run"
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
    assert 3 <= int(stops[0]) < STEPS

    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert steps_in(out) == list(range(1, STEPS + 1))
    assert (out / "model" / "config.json").exists()


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
