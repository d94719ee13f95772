"""`crosslmm profile` as a whole: its processes, its report, its figure, its mistakes."""

import contextlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax.cli import profile as arguments
from crosslmm_jax.cli.app import main
from crosslmm_jax.model.attention import cudnn
from crosslmm_jax.model.attention.blockwise import blockwise_attention
from crosslmm_jax.profiling import record, report, suite
from crosslmm_jax.profiling.cases import Case
from crosslmm_jax.profiling.record import Request
from perf import attention, figure_long_video
from perf.figure import draw


def row(system: str, frames: int, ms: float, **fields: Any) -> dict[str, Any]:
    return {"system": system, "what": "prefill", "frames": frames, "tokens_per_frame": 9, "ms": ms, **fields}


def prefill_report() -> dict[str, Any]:
    found = report.new_report("prefill", command="crosslmm profile prefill")
    found["systems"] = [{"system": "crosslmm_7b", "device": "GPU", "matmul_tflops": 650.0}]
    found["rows"] = [
        row("crosslmm_7b", 32, 100.0, peak_mb=300.0, model_tflop=30.0),
        row("crosslmm_7b", 256, 400.0, peak_mb=2000.0, model_tflop=230.0),
        row("crosslmm_2b", 256, 470.0, peak_mb=700.0, model_tflop=200.0),
        row("llava-onevision-7b", 32, 250.0, peak_mb=1700.0, model_tflop=130.0, tokens_per_frame=196),
        row("llava-onevision-7b", 256, 3400.0, peak_mb=14900.0, model_tflop=1300.0, tokens_per_frame=196),
    ]
    return found


def test_bars_read_the_rows() -> None:
    bars = {bar["what"]: bar for bar in report.with_bars(prefill_report())["bars"]}
    speedup = bars["7B, 256 frames: faster than LLaVA-OneVision-7B"]
    assert (speedup["reading"], speedup["meets_bar"], speedup["meets_goal"]) == (8.5, True, True)
    small = bars["7B, 32 frames: faster than LLaVA-OneVision-7B"]
    assert (small["reading"], small["meets_bar"], small["meets_goal"]) == (2.5, False, False)
    memory = bars["7B, 256 frames: peak over weights"]
    assert (memory["reading"], memory["meets_bar"], memory["meets_goal"]) == (2000, True, False)
    assert bars["2B, 256 frames: prefill"]["meets_bar"] is False
    assert "2B, 32 frames: prefill" not in bars, "not measured"


def test_the_faster_variant_of_the_peer_counts() -> None:
    found = prefill_report()
    found["rows"].append(row("llava-onevision-7b-compiled", 256, 2000.0, tokens_per_frame=196))
    assert report.with_bars(found)["bars"][0]["reading"] == 5


def test_bars_of_training_take_the_best_way_to_recompute() -> None:
    found = report.new_report("train", command="")
    shares = {"layer": 0.38, "elementwise": 0.46, "none": 0.41}
    found["rows"] = [
        row("crosslmm_2b", 64, 500.0, fraction_of_matmul=share, remat=remat) | {"what": "train"}
        for remat, share in shares.items()
    ]
    (bar,) = report.with_bars(found)["bars"]
    assert (bar["reading"], bar["meets_bar"], bar["meets_goal"]) == (0.46, True, False)


def test_bars_of_scaling_and_of_long_videos() -> None:
    found = report.new_report("scaling", command="")
    found["rows"] = [
        row("crosslmm_2b", 64, ms) | {"what": what, "devices": devices, "efficiency": efficiency}
        for what, devices, ms, efficiency in (
            ("encode", 1, 1.0, 1.0), ("encode", 2, 1.1, 0.91), ("train", 2, 1.2, 0.8),
            ("train", 2, 1.1, 0.98),
        )
    ]  # fmt: skip
    readings = [(bar["reading"], bar["meets_bar"]) for bar in report.with_bars(found)["bars"]]
    assert readings == [(0.91, True), (0.98, True)]
    found = long_video_report()
    (bar,) = report.with_bars(found)["bars"]
    assert (bar["reading"], bar["meets_bar"], bar["meets_goal"]) == (8192, True, False), (
        "over the whole video"
    )


def long_video_report() -> dict[str, Any]:
    found = report.new_report("long_video", command="")
    found["systems"] = [{"system": "crosslmm_2b", "device": "GPU"}]
    found["rows"] = [
        row("crosslmm_2b", frames, 1e-3 * frames**power, peak_mb=float(frames), v2v_scope=scope)
        for scope, power, most in (("video", 2, 8192), ("frame", 1, 16384))
        for frames in (32, 1024, 2048, 4096, 8192, 16384)
        if frames <= most
    ]
    return found


def test_figure_of_long_videos_shows_a_line_a_scope_and_its_slope(tmp_path: Path) -> None:
    path = tmp_path / "f.svg"
    figure_long_video.draw(report.with_bars(long_video_report()), str(path))
    text = path.read_text()
    for label in (
        "crosslmm_2b, V2V over the video: slope 2.00 from 1,024 to 8,192",
        "crosslmm_2b, V2V over the frame: slope 1.00 from 2,048 to 16,384",
    ):
        assert f"<!-- {label} -->" in text


def test_the_page_says_what_it_ran_with() -> None:
    found = prefill_report()
    found["systems"][0]["environment"] = {"XLA_FLAGS": "--xla_a=1"}
    found["systems"][0]["request"] = {"overrides": ["vision.frame_chunk=64"]}
    found["rows"][0]["compiler_options"] = {"xla_b": False}
    page = report.markdown(report.with_bars(found))
    assert "  - `vision.frame_chunk=64`, `XLA_FLAGS=--xla_a=1`, `xla_b=False`" in page.splitlines()


def test_other_scopes_do_not_answer_a_bar() -> None:
    found = prefill_report()
    for line in found["rows"]:
        line["v2v_scope"] = "frame"
    assert report.with_bars(found)["bars"] == []


def test_other_tokens_per_frame_do_not_answer_a_bar() -> None:
    found = prefill_report()
    for line in found["rows"]:
        line["tokens_per_frame"] = 16
    assert report.with_bars(found)["bars"] == []


def test_rows_in_8_bits_do_not_answer_a_bar() -> None:
    """The bars are about bfloat16; the encoder's is a share of its rate."""
    found = prefill_report()
    before = report.with_bars(found)["bars"]
    found["rows"] = [row("crosslmm_7b", 256, 1.0, peak_mb=1.0, precision="fp8"), *found["rows"]]
    assert report.with_bars(found)["bars"] == before
    encoder = report.new_report("encoder", command="")
    encoder["rows"] = [
        {**row("crosslmm_2b", 128, 1.0, precision=precision, fraction_of_matmul=fraction), "what": "encoder"}
        for precision, fraction in (("bfloat16", 0.6), ("fp8", 0.9))
    ]
    (bar,) = report.with_bars(encoder)["bars"]
    assert bar["reading"] == 0.6


def test_report_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSLMM_COMMIT", "abc123")
    found = report.with_bars(prefill_report())
    assert found["commit"] == "abc123"
    assert found["matmul_tflops"] == 650
    assert found["versions"]["jax"] and found["versions"]["python"]
    page = report.markdown(found)
    assert "| 7B, 256 frames: peak over weights | 2530 MB | 2100 MB | 1200 MB | 2000 MB | bar |" in page
    lines = page.splitlines()
    header = next(line for line in lines if line.startswith("| system"))
    rows = [line for line in lines if line.startswith(("| crosslmm", "| llava"))]
    assert len(rows) == 5 and all(line.count("|") == header.count("|") for line in rows)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_figure_shows_ours_the_peer_and_the_paper(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"f.{ending}"
    draw(report.with_bars(prefill_report()), str(path))
    assert path.stat().st_size > 10_000
    if ending == "svg":
        text = path.read_text()
        for label in (
            "crosslmm_7b, as printed in the paper",
            "llava-onevision-7b, 196 tokens a frame",
            "8.5x",
        ):
            assert f"<!-- {label} -->" in text


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
    assert files["png"].stat().st_size > 10_000
    assert len(list(tmp_path.glob("trace/tiny/*/**/*.xplane.pb"))) == 2


def test_a_system_out_of_time_is_reported_and_the_next_one_runs(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    suite.profile(
        "prefill", presets=["tiny"], peer_names=["llava-onevision-tiny"], tokens_per_frame=[None],
        options={"frames": (2,)}, outputs=suite.Outputs(json=str(path)), timeout=0.05,
    )  # fmt: skip
    found = json.loads(path.read_text())
    assert found["rows"] == []
    assert found["errors"] == [f"{name}: stopped after 0.05 s" for name in ("tiny", "llava-onevision-tiny")]


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
    found = suite._measure(Request(task="prefill", system="tiny", frames=(2,)), None)
    assert [line["ms"] for line in found["rows"]] == [1.0]
    assert found["errors"] == ["tiny: the measuring process ended with exit code -9"]


def test_the_commands_that_are_written_down_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of docs/results/README.md, as a shell hands it over, up to the processes it would start."""
    page = (Path(__file__).parents[2] / "docs" / "results" / "README.md").read_text()
    asked: list[Request] = []
    monkeypatch.setattr(suite, "_write", lambda *_: None)
    monkeypatch.setattr(
        suite, "_measure",
        lambda request, _: asked.append(request) or {"request": {}, "facts": {}, "rows": [], "errors": []},
    )  # fmt: skip
    commands = [line for line in page.splitlines() if line.startswith("crosslmm profile ")]
    for command in commands:
        line = re.sub(r"\$\(out ([^)]*)\)", r"--json r/\1.json --markdown r/\1.md", command)
        assert main(shlex.split(line)[1:]) == 0, command
    assert {request.task for request in asked} == set(arguments.TASKS)


def test_each_case_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces lie in folders by name, and errors are known by it."""
    request = Request(task="attention", system="tiny", frames=(2,))
    found = record.Record(str(tmp_path / "r.json"), request)
    names: list[str] = []
    monkeypatch.setattr(attention, "run_cases", lambda cases, *_, **__: names.extend(c.name for c in cases))
    attention.run(found)
    assert len(names) == len(set(names)) == 10


def by_blocks(q, k, v, lengths):
    """What cuDNN would compute of each part, all keys."""
    start, stop = jnp.zeros(q.shape[:2], jnp.int32), jnp.full(q.shape[:2], k.shape[1])
    return blockwise_attention(q, k, v, start, stop, q.shape[-1] ** -0.5)


def test_keys_in_parts_are_cases_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each count that divides the keys, for cross-attention alone; and it gives what all keys at once do."""
    request = Request(task="attention", system="tiny", frames=(2,), parts=(2, 4, 5))
    monkeypatch.setattr(attention, "_applies", lambda *_: True)
    monkeypatch.setattr(cudnn, "_with_log_sum_exp", by_blocks)
    cases: list[Case] = []
    monkeypatch.setattr(attention, "run_cases", lambda found, *_, **__: cases.extend(found))
    attention.run(record.Record(str(tmp_path / "r.json"), request))
    split = [case for case in cases if "parts" in case.row]
    assert {(case.row["what"], case.row["parts"]) for case in split} == {
        (what, parts) for what in ("v2v", "t2v", "t2v_decode") for parts in (2, 4)
    }
    assert len({case.name for case in cases}) == len(cases)
    whole = {case.row["what"]: case for case in cases if case.row["backend"] == "blockwise"}
    for case in split:
        arrays = case.inputs()
        got, expected = (c.lower().compile()(*arrays) for c in (case, whole[case.row["what"]]))
        np.testing.assert_allclose(got, expected, atol=1e-5)


MISTAKES = [
    (["prefill"], "nothing to measure; give --preset"),
    (["fly", "--preset", "tiny"], "invalid choice: 'fly'"),
    (["prefill", "--preset", "3b"], "--preset '3b' is unknown"),
    (["prefill", "--preset", "tiny", "--frames", "0"], "--frames 0: give numbers of at least 1"),
    (["scaling", "--preset", "tiny", "--devices", "0"], "--devices 0: give numbers of at least 1"),
    (["attention", "--preset", "tiny", "--parts", "0"], "--parts 0: give numbers of at least 1"),
    (["prefill", "--preset", "tiny", "--parts", "2"], "--parts with prefill: give it with attention"),
    (["train", "--preset", "tiny", "--devices", "2"], "--devices with train: give it with scaling"),
    (["prefill", "--preset", "tiny", "--set", "vision.remat"], "--set vision.remat: give FIELD=VALUE"),
    (["train", "--preset", "tiny", "--remat", "all"], "invalid choice: 'all'"),
    (["prefill", "--preset", "tiny", "--repeats", "0"], "--repeats 0: give a number of at least 1"),
    (
        ["prefill", "--preset", "tiny", "--tokens-per-frame", "8"],
        "--tokens-per-frame 8: give a square number",
    ),
    (["prefill", "--preset", "tiny", "--text-tokens", "16"], "--text-tokens 16: give more than 16"),
    (
        ["prefill", "--preset", "tiny", "--peer", "siglip"],
        "choose one of llava-onevision-7b, llava-onevision-0",
    ),
    (["decode", "--preset", "tiny", "--peer", "siglip"], "leave it out"),
    (["train", "--preset", "tiny", "--precision", "fp8"], "--precision with train: give it with"),
    (["prefill", "--preset", "tiny", "--precision", "fp4"], "invalid choice: 'fp4'"),
    (["train", "--preset", "tiny", "--v2v-scope", "frame"], "--v2v-scope with train: give it with prefill"),
    (["prefill", "--preset", "tiny", "--remat", "none"], "--remat with prefill: give it with train"),
    (
        ["precision", "--preset", "tiny", "--videos", "x", "--figure", "x.png"],
        "--figure with precision",
    ),
    (["precision", "--preset", "tiny"], "--videos DIR: give it with the task precision"),
    (["decode", "--preset", "tiny", "--videos", "x"], "--videos DIR: give it with the task precision"),
    (["prefill", "--preset", "tiny", "--figure", "x.txt"], "--figure x.txt: end the name in .png"),
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
