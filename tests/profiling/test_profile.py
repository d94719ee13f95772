"""`crosslmm profile` as a whole: its processes, its report, its figure, its mistakes."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crosslmm_jax.cli.app import main
from crosslmm_jax.cli.profile import MOVED_OPTIONS, MOVED_TASKS
from crosslmm_jax.profiling import Outputs, Request, profile, report, suite

PREFILL = "crosslmm_jax.profiling.tasks.prefill"


def row(system: str, frames: int, ms: float, **fields: Any) -> dict[str, Any]:
    return {"system": system, "what": "prefill", "frames": frames, "tokens_per_frame": 9, "ms": ms, **fields}


def test_the_page_says_what_it_ran_with() -> None:
    found = report.new_report("prefill", command="crosslmm profile prefill")
    found["systems"] = [
        {
            "system": "crosslmm_7b", "device": "GPU", "matmul_tflops": 650.0,
            "environment": {"XLA_FLAGS": "--xla_a=1"},
            "request": {"overrides": ["--vision.frame-chunk", "64"]},
        }
    ]  # fmt: skip
    found["rows"] = [row("crosslmm_7b", 32, 100.0, compiler_options={"xla_b": False}), row("tiny", 2, 1.0)]
    lines = report.markdown(found).splitlines()
    assert "- crosslmm_7b: GPU, bf16 matmul 650 TFLOP/s" in lines
    assert "  - `--vision.frame-chunk 64`, `XLA_FLAGS=--xla_a=1`, `xla_b=False`" in lines
    table = [line for line in lines if line.startswith("| ")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1


def test_report_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSLMM_COMMIT", "abc123")
    found = report.new_report("prefill", command="crosslmm profile prefill")
    assert found["commit"] == "abc123"
    assert found["versions"]["jax"] and found["versions"]["python"]


def test_the_rate_of_a_report_is_that_of_the_first_system(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"tiny": 650.0, "crosslmm_0.5b": 600.0}

    def measured(request: Request, timeout: float | None) -> dict[str, Any]:
        facts = {"matmul_tflops": rates[request.system], "device": "GPU"}
        return {"request": {}, "facts": facts, "rows": [], "errors": []}

    monkeypatch.setattr(suite, "_measure", measured)
    requests = [Request(task=PREFILL, system=name, frames=(2,)) for name in rates]
    assert profile("prefill", requests, command="", outputs=Outputs())["matmul_tflops"] == 650


@pytest.mark.slow
def test_a_command_measures_in_processes_of_their_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"r.{name}" for name in ("json", "md", "png")}
    words = ["profile", "encoder", "--preset", "tiny", "--frames", "2", "--repeats", "1", "--trace"]
    words += [str(tmp_path / "trace"), "--json", str(files["json"]), "--markdown", str(files["md"])]
    assert main([*words, "--figure", str(files["png"])]) == 0
    found = json.loads(files["json"].read_text())
    assert {(line["system"], line["what"]) for line in found["rows"]} == {
        ("tiny", "encoder"), ("tiny", "encode"),
    }  # fmt: skip
    assert [system["system"] for system in found["systems"]] == ["tiny"]
    assert found["matmul_tflops"] > 0 and found["errors"] == []
    assert files["md"].read_text().strip() in capfd.readouterr().out
    assert not {"bars", "paper"} & set(found) and "goal" not in files["md"].read_text()
    assert files["png"].stat().st_size > 10_000
    assert len(list(tmp_path.glob("trace/tiny/*/**/*.xplane.pb"))) == 2


def test_a_system_out_of_time_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    requests = [Request(task=PREFILL, system=name, frames=(2,)) for name in ("tiny", "crosslmm_0.5b")]
    profile("prefill", requests, command="", outputs=Outputs(json=str(path)), timeout=0.05)
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert found["errors"] == [f"{name}: stopped after 0.05 s" for name in ("tiny", "crosslmm_0.5b")]


def test_a_process_that_dies_leaves_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed for memory, say, after one row was there."""
    program = (
        "import os, sys; from crosslmm_jax.profiling.record import *;"
        " r = Record(sys.argv[-2], Request.from_json(sys.argv[-1]));"
        " r.add_row({'what': 'prefill', 'frames': 2, 'ms': 1.0}); os.kill(os.getpid(), 9)"
    )
    run = suite.subprocess.run

    def dying(command: list[str], **options: Any) -> Any:
        return run([command[0], "-c", program, *command[-2:]], **options)

    monkeypatch.setattr(suite.subprocess, "run", dying)
    found = suite._measure(Request(task=PREFILL, system="tiny", frames=(2,)), None)
    assert [line["ms"] for line in found["rows"]] == [1.0]
    assert found["errors"] == ["tiny: the measuring process ended with exit code -9"]


MISTAKES = [
    (["prefill"], "nothing to measure; give --preset"),
    (["fly", "--preset", "tiny"], "invalid choice: 'fly'"),
    (["prefill", "--preset", "3b"], "--preset '3b' is unknown"),
    (["prefill", "--preset", "tiny", "--frames", "0"], "--frames 0: give numbers of at least 1"),
    (
        ["prefill", "--preset", "tiny", "--set", "vision.remat=none"],
        "--set vision.remat=none is now written --vision.remat none",
    ),
    (["prefill", "--preset", "tiny", "--set"], "--set: write --FIELD VALUE, such as --vision.remat none"),
    (["prefill", "--set", "vision.remat"], "--set vision.remat: write --FIELD VALUE, such as --vision.remat"),
    (["prefill", "--preset", "tiny", "--vision.depth", "3"], "unrecognized arguments: --vision.depth 3"),
    (["prefill", "--preset", "tiny", "--vision.frame-chunk", "3x"], "--vision.frame-chunk"),
    (["train", "--preset", "tiny", "--remat", "all"], "invalid choice: 'all'"),
    (["prefill", "--preset", "tiny", "--repeats", "0"], "--repeats 0: give a number of at least 1"),
    (
        ["prefill", "--preset", "tiny", "--tokens-per-frame", "8"],
        "--tokens-per-frame 8: give a square number",
    ),
    (["prefill", "--preset", "tiny", "--text-tokens", "16"], "--text-tokens 16: give more than 16"),
    (["train", "--preset", "tiny", "--precision", "fp8"], "--precision with train: give it with"),
    (["prefill", "--preset", "tiny", "--precision", "fp4"], "invalid choice: 'fp4'"),
    (["train", "--preset", "tiny", "--v2v-scope", "frame"], "--v2v-scope with train: give it with prefill"),
    (["prefill", "--preset", "tiny", "--remat", "none"], "--remat with prefill: give it with train"),
    (["prefill", "--preset", "tiny", "--figure", "x.txt"], "--figure x.txt: end the name in .png"),
    (["ask", "no/such", "clip.mp4"], "no/such: no such folder; name one that"),
    (["ask", ".", "no.mp4"], "no.mp4: no such file; name a video"),
    (["ask", ".", "no.mp4", "--frames", "0"], "--frames 0: give numbers of at least 1"),
    (["ask", ".", "no.mp4", "--max-new-tokens", "0"], "--max-new-tokens 0: give a number of at least 1"),
    (["prefill", "--preset", "tiny", "--json", "no/such/x.json"], "no/such/x.json: No such file"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_show_before_anything_is_measured(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "_measure", lambda *_: pytest.fail("measured"))
    assert main(["profile", *words]) == 2
    out, err = capfd.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_a_figure_that_cannot_be_written_is_said_once(tmp_path: Path, capsys) -> None:
    """A folder has its name. The numbers matter more, and further systems are measured."""
    found = report.new_report("prefill", command="crosslmm profile prefill")
    found["rows"] = [row("tiny", 32, 1.0, ms_min=1.0, ms_max=1.0)]
    outputs = Outputs(json=str(tmp_path / "f.json"), figure=str(tmp_path / "f.png"))
    (tmp_path / "f.png").mkdir()
    for _ in range(2):
        suite.write_report(found, outputs, suite.PLAIN)
    assert capsys.readouterr().err == f"{tmp_path}/f.png: the figure is not written (Is a directory)\n"
    assert json.loads((tmp_path / "f.json").read_text())["errors"] == found["errors"] != []


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("decoder.remat=false", "--decoder.remat False"),
        ("vision.frame_chunk=null", "--vision.frame-chunk None"),
        ('cross_attention.directions=["v2v","t2v"]', "--cross-attention.directions v2v t2v"),
        ("cross_attention.directions=[]", "--cross-attention.directions"),
        ('vision.remat="none"', "--vision.remat none"),
        ("vision.frame_chunk=64", "--vision.frame-chunk 64"),
    ],
)
def test_the_new_spelling_of_set_works(
    assignment: str, words: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides: list[list[str]] = []

    def measured(request: Request, timeout: float | None) -> dict[str, Any]:
        overrides.append(list(request.overrides))
        return {"request": {}, "facts": {}, "rows": [], "errors": []}

    monkeypatch.setattr(suite, "_measure", measured)
    assert main(["profile", "prefill", "--preset", "tiny", "--set", assignment]) == 2
    assert capfd.readouterr().err.strip().endswith(f"--set {assignment} is now written {words}")
    main(["profile", "prefill", "--preset", "tiny", *words.split()])
    assert overrides == [words.split()]


MOVED = {(name,): name for name in MOVED_TASKS} | {
    ("prefill", name, "x"): command for name, command in MOVED_OPTIONS.items()
}


@pytest.mark.parametrize(("words", "command"), MOVED.items(), ids=lambda value: " ".join(value))
def test_words_that_moved_name_the_new_command(
    words: tuple[str, ...], command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", *words, "--preset", "tiny"]) == 2
    _, err = capfd.readouterr()
    assert (
        f"`crosslmm profile {words[-2:][0]}` is now `python -m perf {command}`" in err
        and err.count("\n") == 1
    )


def measuring_processes(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # a child that has ended
            if b"profiling.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def is_running(pid: int) -> bool:
    """Not so of a zombie, which holds nothing and waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_stopped_command_takes_the_measuring_process_along(tmp_path: Path, number: signal.Signals) -> None:
    """Which would hold the device, and its memory, for nobody."""
    command = [sys.executable, "-m", "crosslmm_jax.cli", "profile", "encoder", "--preset", "tiny"]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([*command, "--json", str(tmp_path / "r.json")], cwd=root) as process:
        deadline = time.monotonic() + 60
        while not (found := measuring_processes(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(30) == -number
    (worker,) = found
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(worker)
