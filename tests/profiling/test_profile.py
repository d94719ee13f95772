"""`crosslmm profile` as a whole: its processes, its report, its figure, its mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from crosslmm_jax.cli import main
from crosslmm_jax.profiling import report, suite
from crosslmm_jax.profiling.figure import draw
from crosslmm_jax.profiling.record import Request


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


def test_other_tokens_per_frame_do_not_answer_a_bar() -> None:
    found = prefill_report()
    for line in found["rows"]:
        line["tokens_per_frame"] = 16
    assert report.with_bars(found)["bars"] == []


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


MISTAKES = [
    (["prefill"], "nothing to measure; give --preset"),
    (["fly", "--preset", "tiny"], "invalid choice: 'fly'"),
    (["prefill", "--preset", "3b"], "--preset '3b' is unknown"),
    (["prefill", "--preset", "tiny", "--frames", "0"], "--frames 0: give numbers of at least 1"),
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
