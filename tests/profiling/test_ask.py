"""`crosslmm profile ask`: its processes, how runs become rows, its page and its figure."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from crosslmm_jax import presets
from crosslmm_jax.cli.app import main
from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.model import init_params
from crosslmm_jax.model_folder import save_model_folder
from crosslmm_jax.profiling import AskRequest
from crosslmm_jax.profiling.report import new_report
from crosslmm_jax.profiling.tasks import ask


def request(**fields: Any) -> AskRequest:
    return AskRequest(task=ask.__name__, system="m", frames=(), model="m", video="v.mp4", **fields)


def run_of(total: float, **phases: float) -> dict[str, Any]:
    return {
        "frames": 4, "tokens": 8, "finish_reason": "length", "phases": phases, "total": total,
        "process": total,
    }  # fmt: skip


@pytest.mark.slow
def test_a_model_and_a_file(
    tmp_path: Path, tokenizer_folder: Path, synthetic, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model_folder(
        tmp_path / "model", config=presets.tiny(), params=init_params(presets.tiny(), jax.random.key(0)),
        tokenizer_folder=tokenizer_folder, sampling=SamplingConfig(frames=4), system_prompt="You help.",
    )  # fmt: skip
    video, other = (str(path) for path in synthetic.heldout_videos[:2])
    words = ["profile", "ask", str(tmp_path / "model"), video, "--frames", "4", "--max-new-tokens", "3"]
    figure = tmp_path / "f.png"
    options = ["--repeats", "1", "--json", "-", "--other-video", other, "--figure", str(figure)]
    assert main([*words, *options]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["errors"] == []
    rows = {row["what"]: row for row in found["rows"]}
    assert list(rows) == [
        "first process", "new process", "warm process, another clip", "warm process, fewer frames",
        "warm process, the same clip", "further answer",
    ]  # fmt: skip
    assert {row["frames"] for row in rows.values()} == {3, 4} and rows["warm process, fewer frames"][
        "frames"
    ] == 3
    new, warm = rows["new process"], rows["warm process, the same clip"]
    assert set(new["phases_s"]) == {*ask.PHASES, "tokenizer", "weights", "first_token"}
    parts = sum(new["phases_s"][name] for name in ask.PHASES)
    assert 1e3 * parts == pytest.approx(new["ms"], rel=0.01), "the phases are the whole"
    assert new["process_s"] >= 1e-3 * new["ms"], "no process is shorter than what it measured"
    assert set(warm["phases_s"]) == {"decode", "encode", "prefill", "answer", "first_token"}
    last = rows["further answer"]["phases_s"]
    assert 0 < last["first_token"] <= last["answer"] == pytest.approx(1e-3 * rows["further answer"]["ms"])
    assert found["systems"][0]["load_s"] > 0 and found["systems"][0]["device"]
    assert "XLA_PYTHON_CLIENT_ALLOCATOR" not in found["systems"][0]["environment"], "as for a user"
    assert not {"bars", "paper"} & set(found) and figure.stat().st_size > 10_000


def test_several_runs_are_one_row_with_medians_of_the_phases() -> None:
    runs = [
        run_of(3.0, load=1.0, answer=2.0),
        run_of(6.0, load=4.0, answer=1.0),
        run_of(4.0, load=2.0, answer=4.0),
    ]
    row = ask.combined(runs)
    assert row["phases_s"] == {"load": 2.0, "answer": 2.0}
    assert (row["ms"], row["ms_min"], row["ms_max"]) == (4000, 3000, 6000)
    assert row["tokens_per_second"] == 4 and row["process_s"] == 4 and row["runs"] == runs


def test_a_failing_process_says_why() -> None:
    with pytest.raises(RuntimeError, match="m: no such folder"):
        ask.in_new_process(request())


def test_one_number_of_frames() -> None:
    with pytest.raises(ask.UserError, match="--frames: give one number"):
        AskRequest(task="", system="m", frames=(1, 2), model="m", video="v.mp4")


def test_the_page_has_a_column_per_phase_that_was_measured() -> None:
    found = new_report("ask", command="crosslmm profile ask")
    new = ask.combined([run_of(7.25, imports=1.0, load=2.0, weights=1.5, answer=4.0)])
    found["rows"] = [
        {"system": "m", "what": "new process", **new},
        {
            "system": "m",
            "what": "further answer",
            **ask.combined([run_of(0.5, answer=0.5, first_token=0.125)]),
        },
        {"system": "m", "what": "something else", "ms": 1.0},
    ]
    lines = [line for line in ask.page(found).splitlines() if line.startswith("| ")]
    assert lines[0] == (
        "| system | what | frames | tokens | imports | load | weights | answer | first token | total | least"
        " | most | process | tokens/s |"
    )
    assert lines[2].split(" | ")[4:10] == ["1.000", "2.000", "1.500", "4.000", "-", "7.250"]
    assert lines[3].split(" | ")[4:10] == ["-", "-", "-", "0.500", "0.125", "0.500"]
    assert [line for line in lines if "something else" in line] == ["| m | something else | 1 |"]


def test_the_figure_shows_what_the_phases_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[list[float]]] = {}
    barh = Axes.barh

    def noted(self: Axes, y: Any, width: Any, **options: Any) -> Any:
        drawn.setdefault(options["label"], []).append(list(width))
        return barh(self, y, width, **options)

    monkeypatch.setattr(Axes, "barh", noted)
    found = new_report("ask", command="")
    found["rows"] = [
        {"system": "m", "what": "new process", **ask.combined([run_of(7.25, load=2.0, answer=4.0)])},
        {"system": "m", "what": "further answer", **ask.combined([run_of(0.5, answer=0.5, first_token=0.1)])},
        {"system": "m", "what": "not an answer", "ms": 9.0},
    ]
    ask.draw({**found, "rows": []}, str(tmp_path / "none.svg"))
    assert not (tmp_path / "none.svg").exists()
    ask.draw(found, str(tmp_path / "f.svg"))
    assert drawn == {"load": [[2.0], [0.0]], "answer": [[4.0], [0.5]], "other": [[1.25], [0.0]]}
