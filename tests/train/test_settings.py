"""What may change between two starts of a run is decided by the roles of fields; paths count by content."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from crosslmm_jax.cli.app import main
from crosslmm_jax.config_io import load_experiment
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model_folder import content_digest, find_model_folder
from crosslmm_jax.train import loop
from crosslmm_jax.train.settings import check_resumable, check_same_settings, settings_of, with_known_digests

SETTINGS = {
    "data": {"index": "a", "tokenizer": "t", "batch_size": 8, "max_bad_fraction": 0.1,
             "resampling": "bicubic"},
    "model": {"decoder": {"num_heads": 4, "remat": True}},
    "stage": {"learning_rate": 1e-4, "steps": 9, "trainable": ["decoder"]},
    "run": {"out": "a", "seed": 0, "init_from": "m"},
    "mesh": {"data": 8},
    "index_digest": "i0", "tokenizer_digest": "t0", "init_from_digest": "m0",
    "validation_digest": None,
}  # fmt: skip


def changed(**values: object) -> dict:
    """SETTINGS with other values, under names such as `stage__steps`."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in SETTINGS.items()}
    for name, value in values.items():
        *parents, last = name.split("__")
        node = result
        for parent in parents:
            node = node[parent]
        node[last] = value
    return result


def compare(now: dict, *, accept_changes: bool = False, saved: dict = SETTINGS) -> list[str]:
    return check_resumable(now, saved, where="x", accept_changes=accept_changes)


@pytest.mark.parametrize(
    "values",
    [
        {"mesh__data": 4}, {"run__out": "b"}, {"model__decoder": {"num_heads": 4, "remat": False}},
        # Places of the same content.
        {"data__index": "b"}, {"data__tokenizer": "u"}, {"run__init_from": "n"},
        {"init_from_digest": None},  # the folder that a run started from is gone
    ],
    ids=str,
)  # fmt: skip
def test_what_may_change(values) -> None:
    assert compare(changed(**values)) == []


@pytest.mark.parametrize(
    ("values", "change"),
    [
        ({"stage__learning_rate": 2e-4}, "stage.learning_rate was 0.0001 and is 0.0002"),
        ({"stage__steps": 12}, "stage.steps was 9 and is 12"),
        ({"data__batch_size": 16}, "data.batch_size was 8 and is 16"),
        ({"data__max_bad_fraction": 0.5}, "data.max_bad_fraction was 0.1 and is 0.5"),
        (
            {"data__index": "b", "index_digest": "i1"},
            "data.index was 'a' (content i0) and is 'b' (content i1)",
        ),
        ({"stage__new": 1}, "stage.new was '(no such field)' and is 1"),
    ],
)
def test_what_may_change_on_purpose(values, change) -> None:
    with pytest.raises(ConfigError) as error:
        compare(changed(**values))
    assert str(error.value) == (
        f"x: this checkpoint was written with another config: {change}; set these fields back, or add"
        " --run.accept-changes to go on with the new values"
    )
    assert compare(changed(**values), accept_changes=True) == [change]


@pytest.mark.parametrize(
    ("values", "change"),
    [
        ({"data__resampling": "bilinear"}, "data.resampling was 'bicubic' and is 'bilinear'; these decide w"),
        ({"model__decoder": {"num_heads": 8}}, "model.decoder.num_heads was 4 and is 8; these decide what"),
        ({"tokenizer_digest": "t1"}, "data.tokenizer was 't' (content t0) and is 't' (content t1); these"),
        ({"init_from_digest": "m1"}, "run.init_from was 'm' (content m0) and is 'm' (content m1); these"),
        ({"run__init_from": "n", "init_from_digest": None}, "run.init_from was 'm' and is 'n'; these decide"),
        ({"run__seed": 1}, "run.seed was 0 and is 1; these decide the weights before the first step and"),
        ({"stage__trainable": ["v2v"]}, "stage.trainable was ['decoder'] and is ['v2v']; these decide what"),
    ],
)  # fmt: skip
def test_what_cannot_change(values, change) -> None:
    with pytest.raises(ConfigError) as error:
        compare(changed(**values, stage__learning_rate=1.0), accept_changes=True)
    assert change in str(error.value)
    assert "cannot change within a run: set them back, or choose another run.out" in str(error.value)
    assert "learning_rate" not in str(error.value), "that could stay"


def test_checkpoints_of_earlier_versions_are_compared_by_path() -> None:
    saved = changed(tokenizer_digest=None, init_from_digest=None)
    assert compare(SETTINGS, saved=saved) == []
    with pytest.raises(ConfigError, match=r"data\.tokenizer was 't' and is 'u'"):
        compare(changed(data__tokenizer="u"), saved=saved)


def test_a_field_that_is_younger_than_the_checkpoint_had_its_default() -> None:
    assert compare(changed(stage__clip_norm=1.0, data__modality_weights={"video": 0.0})) == []
    with pytest.raises(ConfigError, match=r"stage\.clip_norm was 1\.0 and is 2\.0"):
        compare(changed(stage__clip_norm=2.0))


def test_what_a_path_led_to_stays_known() -> None:
    gone = changed(init_from_digest=None)
    check_same_settings([SETTINGS, gone])
    assert with_known_digests(gone, SETTINGS) == SETTINGS
    with pytest.raises(ConfigError, match="init_from_digest is 'm0' on process 0 and 'm1' on process 1"):
        check_same_settings([SETTINGS, changed(init_from_digest="m1")])


def test_an_option_without_a_word_is_true(experiment, config_file, tmp_path) -> None:
    path = config_file(experiment(tmp_path))
    both = load_experiment(path, ["--run.accept_changes", "--data.shuffle", "False", "--run.tensorboard"])
    assert (both.run.accept_changes, both.data.shuffle, both.run.tensorboard) == (True, False, True)


@pytest.fixture(scope="module")
def stopped(experiment, tmp_path_factory):
    """A run of two steps, with its config."""
    config = experiment(tmp_path_factory.mktemp("stopped") / "run", stage={"steps": 2})
    loop.train(config, quiet=True)
    return config


@pytest.mark.slow
def test_a_longer_schedule_and_another_batch_size(stopped, config_file, capfd, caplog) -> None:
    """Follows the fix that the refusal names, and goes on from the checkpoint, in another place."""
    out = Path(stopped.run.out).with_name("moved")
    shutil.copytree(stopped.run.out, out)
    tokenizer = out.with_name("tokenizer")
    shutil.copytree(stopped.data.tokenizer, tokenizer)
    moved = ["--run.out", str(out), "--data.tokenizer", str(tokenizer)]
    words = ["train", config_file(stopped), *moved, "--data.batch-size", "24", "--stage.steps", "3"]
    assert main(words) == 2
    assert "or add --run.accept-changes to go on" in capfd.readouterr().err
    assert main([*words, "--run.accept-changes"]) == 0
    (message,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert message == (
        f"{out}: this run resumes with other settings: data.batch_size was 8 and is 24;"
        " stage.steps was 2 and is 3"
    )
    lines = [line["step"] for line in loop.read_metrics(out)]
    assert lines == [1, 2, 3]
    position = out / "checkpoints" / "3" / "data" / "metadata"
    assert json.loads(position.read_text())["position"] == 48, "16 rows were read, then 24, from row 24 on"
    assert main(words) == 0, "the new checkpoint has the new settings"
    fewer = [*words[:-1], "1", "--run.accept-changes"]
    assert main(fewer) == 2
    assert f"steps is 1; the checkpoint in {out} has 3 steps: set it to 3 or more" in capfd.readouterr().err


@pytest.mark.slow
def test_changes_of_a_finished_run_are_not_ignored_in_silence(stopped, caplog) -> None:
    stage = dataclasses.replace(stopped.stage, learning_rate=0.5)
    run = dataclasses.replace(stopped.run, accept_changes=True)
    loop.train(dataclasses.replace(stopped, stage=stage, run=run), quiet=True)
    assert (
        "this run is finished, so that these settings change nothing: stage.learning_rate was" in caplog.text
    )


@pytest.mark.slow
def test_a_stage_starts_from_the_folder_of_a_run(stopped, experiment, tmp_path) -> None:
    """And may resume when that folder has moved, or is gone."""
    first = tmp_path / "first"
    shutil.copytree(stopped.run.out, first)
    config = experiment(tmp_path / "run", stage={"steps": 1}, init_from=str(first))
    loop.train(config, quiet=True)
    first.rename(tmp_path / "renamed")
    again = dataclasses.replace(
        config, run=dataclasses.replace(config.run, init_from=str(tmp_path / "renamed"))
    )
    assert loop.train(again, quiet=True).resumed_step == 1
    shutil.rmtree(tmp_path / "renamed")
    assert loop.train(config, quiet=True).resumed_step == 1


def test_digest_of_a_model(stopped, tmp_path) -> None:
    folder = find_model_folder(stopped.run.out)
    before = content_digest(folder)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert content_digest(copy) == before
    weights = copy / "model.safetensors"
    content = np.fromfile(weights, np.uint8)
    content[len(content) // 2] ^= 1
    content.tofile(weights)
    assert content_digest(copy) != before
    assert settings_of(stopped)["init_from_digest"] is None
