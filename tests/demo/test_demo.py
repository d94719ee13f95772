"""The quick demo, end to end, and what it refuses."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from crosslmm_jax import load
from crosslmm_jax.cli.app import main
from crosslmm_jax.config_io import to_dict
from crosslmm_jax.demo import recipe, run
from crosslmm_jax.demo.evaluate import answered_exactly
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import load_model_config

Finished = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out = tmp_path_factory.mktemp("demo") / "my run"
    return out, run(out, seed=0, quick=True)


@pytest.mark.slow
def test_leaves_a_model_a_figure_and_numbers(finished: Finished) -> None:
    out, report = finished
    stored = json.loads((out / "demo.json").read_text())
    assert stored == report
    assert 0 <= stored["control_accuracy"] <= 1 and 0 <= stored["accuracy"] <= 1 and stored["chance"] == 0.25
    phases = {"data", "stage1", "stage2", "evaluation", "control", "questions", "total"}
    assert set(stored["seconds"]) == phases and min(stored["seconds"].values()) > 0
    assert len(stored["heldout_videos"]) == recipe.QUICK.num_heldout
    assert all(Path(path).is_file() for path in stored["heldout_videos"])
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len({question["question"] for question in stored["questions"]}) == 2
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    for folder in (out, stored["model"]):
        assert isinstance(load(folder).watch(stored["heldout_videos"][0]).ask("What?", max_new_tokens=2), str)


@pytest.mark.slow
def test_accuracy_is_that_of_answers_as_they_are_written(finished: Finished) -> None:
    """One pass over question and answer against the words that greedy decoding gives."""
    out, report = finished
    data = dataclasses.replace(recipe.heldout(out.resolve(), size=recipe.QUICK), batch_size=12)
    right = answered_exactly(out / "model", data)
    assert right.mean() == report["accuracy"] and len(right) == report["num_questions"]
    rows = json.loads((out / "data" / "heldout.json").read_text())
    model = load(out)
    for number in (0, 1, 2, 3, 4, len(rows) - 1):
        human, gpt = (turn["value"] for turn in rows[number]["conversations"])
        video = model.watch(out / "data" / rows[number]["video"])
        answer = video.ask(human.removeprefix("<image>\n"), max_new_tokens=8)
        assert (answer == gpt) == right[number]


@pytest.mark.slow
def test_the_control_has_no_cross_attention(finished: Finished) -> None:
    out, _ = finished
    assert load_model_config(out / "train" / "control_stage2" / "model").cross_attention.directions == ()
    assert load_model_config(out / "model").cross_attention.directions == ("v2v", "t2v")
    lines = (out / "train" / "control_stage2" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == recipe.QUICK.stage2_steps and all(json.loads(line)["gate"] == {} for line in lines)


@pytest.mark.slow
def test_repeating_it_gives_the_same_and_other_settings_are_refused(finished: Finished, capsys) -> None:
    """Also where the figure cannot be written."""
    out, report = finished
    figure = (out / "demo.png").read_bytes()
    (out / "demo.png").unlink()
    (out / "demo.png").mkdir()
    before = (out / "train" / "stage2" / "metrics.jsonl").stat().st_mtime_ns
    again = run(out, seed=0, quick=True)
    said = capsys.readouterr().out
    assert f"{out}/demo.png: the figure is not written (Is a directory)" in said
    assert "a MODEL folder; ask it:\n" in said
    first = report["questions"][0]
    line = ["crosslmm", "ask", str(out), first["video"], first["question"]]
    assert shlex.split(said.splitlines()[-1]) == line  # can be pasted, though the folder has a space
    (out / "demo.png").rmdir()
    (out / "demo.png").write_bytes(figure)
    assert (again["accuracy"], again["control_accuracy"]) == (report["accuracy"], report["control_accuracy"])
    assert again["reused"] == {"model": True, "control": True}
    assert (out / "train" / "stage2" / "metrics.jsonl").stat().st_mtime_ns == before
    for other in ({"seed": 1, "quick": True}, {"seed": 0, "quick": False}):
        with pytest.raises(UserError, match="another seed"):
            run(out, **other)


def test_the_control_differs_in_its_graph_alone(tmp_path: Path) -> None:
    for with_it, without in zip(
        *(recipe.both_stages(tmp_path, size=recipe.FULL, seed=5, cross_attention=on) for on in (True, False)),
        strict=True,
    ):
        assert without.stage.directions == ()
        parts = {part for part in with_it.stage.trainable if part not in ("v2v", "t2v")}
        assert set(without.stage.trainable) == parts < set(with_it.stage.trainable)
        same = {"trainable": with_it.stage.trainable, "directions": with_it.stage.directions}
        assert dataclasses.replace(without.stage, **same) == with_it.stage
        assert (without.model, without.data) == (with_it.model, with_it.data)
        runs = [to_dict(config.run) for config in (with_it, without)]
        different = {name for name in runs[0] if runs[0][name] != runs[1][name]}
        assert different <= {"out", "init_from"}
    assert with_it.stage.directions == ("v2v", "t2v") and with_it.run.seed == with_it.data.seed == 5


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "demo"):
        with pytest.raises(UserError, match=f"^--out {out}: "):
            run(out, seed=0, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_with_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    assert main(["demo", "--out", str(tmp_path), "--quick"]) == 2
    error = capsys.readouterr().err
    assert "holds files that are not a demo's" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_out_of_range_is_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(UserError, match=f"--seed is {seed}"):
        run(tmp_path / "new", seed=seed, quick=True)
    assert not (tmp_path / "new").exists()
