"""Bars, goals and the paper's numbers: what of a report answers them, and the pages and figures with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from crosslmm_jax.profiling import Report
from crosslmm_jax.profiling.report import new_report
from perf import figure, figure_long_video
from perf.__main__ import main
from perf.bars import page, with_bars

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def row(system: str, frames: int, ms: float, **fields: Any) -> dict[str, Any]:
    return {"system": system, "what": "prefill", "frames": frames, "tokens_per_frame": 9, "ms": ms, **fields}


def prefill_report() -> Report:
    found = new_report("prefill", command="crosslmm profile prefill")
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
    bars = {bar["what"]: bar for bar in with_bars(prefill_report())["bars"]}
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
    assert with_bars(found)["bars"][0]["reading"] == 5


def test_bars_of_training_take_the_best_way_to_recompute() -> None:
    found = new_report("train", command="")
    shares = {"layer": 0.38, "elementwise": 0.46, "none": 0.41}
    found["rows"] = [
        row("crosslmm_2b", 64, 500.0, fraction_of_matmul=share, remat=remat) | {"what": "train"}
        for remat, share in shares.items()
    ]
    (bar,) = with_bars(found)["bars"]
    assert (bar["reading"], bar["meets_bar"], bar["meets_goal"]) == (0.46, True, False)


def test_bars_of_scaling_and_of_long_videos() -> None:
    found = new_report("scaling", command="")
    found["rows"] = [
        row("crosslmm_2b", 64, ms) | {"what": what, "devices": devices, "efficiency": efficiency}
        for what, devices, ms, efficiency in (
            ("encode", 1, 1.0, 1.0), ("encode", 2, 1.1, 0.91), ("train", 2, 1.2, 0.8),
            ("train", 2, 1.1, 0.98),
        )
    ]  # fmt: skip
    readings = [(bar["reading"], bar["meets_bar"]) for bar in with_bars(found)["bars"]]
    assert readings == [(0.91, True), (0.98, True)]
    found = long_video_report()
    (bar,) = with_bars(found)["bars"]
    assert (bar["reading"], bar["meets_bar"], bar["meets_goal"]) == (8192, True, False), (
        "over the whole video"
    )


def long_video_report() -> Report:
    found = new_report("long_video", command="")
    found["systems"] = [{"system": "crosslmm_2b", "device": "GPU"}]
    found["rows"] = [
        row("crosslmm_2b", frames, 1e-3 * frames**power, peak_mb=float(frames), v2v_scope=scope)
        for scope, power, most in (("video", 2, 8192), ("frame", 1, 16384))
        for frames in (32, 1024, 2048, 4096, 8192, 16384)
        if frames <= most
    ]
    return found


def test_figure_of_long_videos_shows_a_line_per_scope_and_its_slope(tmp_path: Path) -> None:
    path = tmp_path / "f.svg"
    figure_long_video.draw(long_video_report(), str(path))
    text = path.read_text()
    for label in (
        "crosslmm_2b, V2V over the video: slope 2.00 from 1,024 to 8,192",
        "crosslmm_2b, V2V over the frame: slope 1.00 from 2,048 to 16,384",
    ):
        assert f"<!-- {label} -->" in text


def test_other_scopes_do_not_answer_a_bar() -> None:
    found = prefill_report()
    for line in found["rows"]:
        line["v2v_scope"] = "frame"
    assert with_bars(found)["bars"] == []


def test_other_tokens_per_frame_do_not_answer_a_bar() -> None:
    found = prefill_report()
    for line in found["rows"]:
        line["tokens_per_frame"] = 16
    assert with_bars(found)["bars"] == []


def test_rows_in_8_bits_do_not_answer_a_bar() -> None:
    """The bars are about bfloat16; the encoder's is a share of its rate."""
    found = prefill_report()
    before = with_bars(found)["bars"]
    found["rows"] = [row("crosslmm_7b", 256, 1.0, peak_mb=1.0, precision="fp8"), *found["rows"]]
    assert with_bars(found)["bars"] == before
    encoder = new_report("encoder", command="")
    encoder["rows"] = [
        {**row("crosslmm_2b", 128, 1.0, precision=precision, fraction_of_matmul=fraction), "what": "encoder"}
        for precision, fraction in (("bfloat16", 0.6), ("fp8", 0.9))
    ]
    (bar,) = with_bars(encoder)["bars"]
    assert bar["reading"] == 0.6


def test_the_page_shows_bars_and_rows() -> None:
    lines = page(prefill_report()).splitlines()
    assert "| 7B, 256 frames: peak over weights | 2530 MB | 2100 MB | 1200 MB | 2000 MB | bar |" in lines
    header = next(line for line in lines if line.startswith("| system"))
    rows = [line for line in lines if line.startswith(("| crosslmm", "| llava"))]
    assert len(rows) == 5 and all(line.count("|") == header.count("|") for line in rows)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_figure_shows_ours_the_peer_and_the_paper(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"f.{ending}"
    figure.draw(prefill_report(), str(path))
    assert path.stat().st_size > 10_000
    if ending == "svg":
        text = path.read_text()
        for label in (
            "crosslmm_7b, as printed in the paper",
            "llava-onevision-7b, 196 tokens per frame",
            "8.5x",
        ):
            assert f"<!-- {label} -->" in text


def test_a_report_of_the_users_command_gets_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a file that was measured by an earlier version: page, figure, and JSON with the same readings."""
    before = json.loads((RESULTS / "h200_prefill.json").read_text())
    paths = {name: tmp_path / f"r.{name}" for name in ("json", "md", "png")}
    words = ["report", str(RESULTS / "h200_prefill.json"), "--json", str(paths["json"])]
    assert main([*words, "--markdown", str(paths["md"]), "--figure", str(paths["png"])]) == 0
    found = json.loads(paths["json"].read_text())
    readings = [[line["reading"] for line in report["bars"]] for report in (before, found)]
    assert readings[0] == readings[1] and found["rows"] == before["rows"]
    assert paths["md"].read_text() == capsys.readouterr().out
    assert paths["png"].stat().st_size > 10_000


@pytest.mark.parametrize("content", ["{}", "[]", "x"])
def test_a_file_that_is_no_report(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    assert main(["report", str(path)]) == main(["report", str(tmp_path / "none.json")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "r.json: " in first and "none.json: " in second
    assert all(line.endswith("give the --json file of a report") for line in (first, second))
