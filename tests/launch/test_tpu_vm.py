"""launch/tpu_vm.sh with two hosts of a slice: two folders, and what replaces gcloud and the metadata server.

The hosts train on the CPU. Everything else is as on a slice: the command that gcloud hands to each host runs
there, asks that host's metadata server for its place, and starts training.
"""

import contextlib
import http.server
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# `gcloud ... --command=COMMAND` runs COMMAND on all hosts at once; its code is the first that is not 0.
GCLOUD = """
    for word; do [[ $word == --command=* ]] && command=${word#--command=}; done
    [[ "$*" == "compute tpus tpu-vm ssh slice --zone=here --worker=all --command=$command" ]] || exit 99
    pids=() code=0
    for host in "$HOSTS"/*; do
      cd "$host" && HOME=$host GCE_METADATA_IP=$(cat metadata_address) bash -c "$command" &
      pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || { result=$?; ((code)) || code=$result; }; done
    exit "$code"
"""


@contextlib.contextmanager
def metadata_server(attributes: dict[str, str]) -> Iterator[str]:
    """The address of a server of one host's attributes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((value if known and value else "").encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def hosts(
    launch: Path, fake_program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Path]]:
    """The home folders of two hosts, each with this repository in `crosslmm`."""
    fake_program("gcloud", GCLOUD)
    monkeypatch.setenv("HOSTS", str(tmp_path / "hosts"))
    folders = [tmp_path / "hosts" / str(index) for index in range(2)]
    with contextlib.ExitStack() as stack:
        for index, folder in enumerate(folders):
            (folder / "crosslmm").mkdir(parents=True)
            for name in ("launch", "crosslmm_jax"):
                (folder / "crosslmm" / name).symlink_to(launch.parent / name)
            attributes = {
                "agent-worker-number": str(index),
                "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.1",
            }
            address = stack.enter_context(metadata_server(attributes))
            (folder / "metadata_address").write_text(address)
        yield folders


@pytest.fixture
def tpu_vm(launch: Path, cpu_environment, free_port) -> Callable[..., subprocess.Popen[str]]:
    """`tpu_vm(*words, **variables)`: starts the launcher."""

    def start(*words: str, **variables: str) -> subprocess.Popen[str]:
        environ = os.environ | cpu_environment | {"TPU": "slice", "ZONE": "here", "PORT": str(free_port())}
        return subprocess.Popen(
            [launch / "tpu_vm.sh", *words], env=environ | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.slow
@pytest.mark.multihost
def test_two_hosts_train_stop_and_resume(hosts: list[Path], tpu_vm, config: Path, pause) -> None:
    run = config.parent / "tpu_vm"
    words = (str(config), "--run.out", str(run))
    pause(1)
    first = tpu_vm(*words)
    deadline = time.monotonic() + 240
    while last_step(run) < 3 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    second = tpu_vm(*words)
    assert second.wait(timeout=60) == 1
    assert second.communicate()[0].count("a run is active here") == 2
    stop = tpu_vm(STOP="1")
    assert stop.wait(timeout=60) == 0, stop.communicate()[0]
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 130, output
    assert "which is saved" in output

    pause(0)
    resumed = tpu_vm(*words)
    output = resumed.communicate(timeout=240)[0]
    assert resumed.returncode == 0, output
    assert (run / "model" / "config.json").exists()
    assert "which is saved" not in output, "of the start before"


def test_the_exit_code_is_that_of_training(hosts: list[Path], tpu_vm, fake_program) -> None:
    """Also that of one host alone. A pid file that the process before has left behind is in nobody's way."""
    python = fake_program(
        "train",
        '[[ $2 == *xla_flags ]] && exit; echo "$* at $COORDINATOR_ADDRESS"; exit $((3 * PROCESS_ID))\n',
    )
    for folder in hosts:
        (folder / "crosslmm" / f"crosslmm.{os.uname().nodename}.pid").write_text(f"{os.getpid()}\n")
    done = tpu_vm("a config.py", "--run.out", "x", PYTHON=str(python), PORT="4321")
    output = done.communicate(timeout=60)[0]
    assert done.returncode == 3, output
    assert output.count("-m crosslmm_jax.cli train a config.py --run.out x at 127.0.0.1:4321\n") == 2


def test_training_outlives_the_connection(hosts: list[Path], tpu_vm, fake_program, tmp_path: Path) -> None:
    python = fake_program(
        "train", '[[ $2 == *xla_flags ]] && exit; echo started; sleep 3; echo >"$DONE.$PROCESS_ID"\n'
    )
    connection = tpu_vm("x.py", PYTHON=str(python), DONE=str(tmp_path / "done"))
    assert connection.stdout is not None
    assert [connection.stdout.readline() for _ in hosts] == ["started\n", "started\n"]
    for folder in hosts:  # the shells that the connection has started, with what they print to
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes()
                if os.readlink(process / "cwd").startswith(str(folder)) and b"_tpu_host.sh" in words:
                    os.kill(int(process.name), signal.SIGKILL)
    connection.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("done.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(list(tmp_path.glob("done.*"))) == 2


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("folder", 2, "{host} has no crosslmm/launch/_tpu_host.sh; copy the repository there, or set FOLDER"),
        ("interpreter", 2, "{host}: no .venv/bin/python in {folder}/crosslmm; install there, or set PYTHON"),
        ("metadata", 1, "{host}: the metadata server does not tell agent-worker-number (curl: 22); is this"),
    ],
)
def test_a_host_that_cannot_train_stops_all_before_they_start(
    hosts: list[Path], tpu_vm, fault: str, code: int, message: str
) -> None:
    variables, folder = {"PYTHON": "true"}, hosts[1]
    with metadata_server({}) as empty:
        if fault == "folder":
            (folder / "crosslmm").rename(folder / "elsewhere")
        elif fault == "interpreter":
            variables["PYTHON"] = ".venv/bin/python"
            good = hosts[0] / "crosslmm" / ".venv" / "bin"
            good.mkdir(parents=True)
            (good / "python").symlink_to("/bin/true")
        else:
            (folder / "metadata_address").write_text(empty)
        done = tpu_vm("x.py", **variables)
        output = done.communicate(timeout=60)[0]
    assert done.returncode == code, output
    assert f"crosslmm: error: {message.format(host=os.uname().nodename, folder=folder)}" in output
    assert not list(hosts[0].rglob("*.log")), "nothing was started"


def test_stopping_nothing_says_so(hosts: list[Path], tpu_vm) -> None:
    done = tpu_vm(STOP="1")
    assert done.communicate(timeout=60)[0] == 2 * f"crosslmm: {os.uname().nodename}: no run is active here\n"
    assert done.returncode == 0
