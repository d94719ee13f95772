"""Whole runs on real files. Interrupted at any moment, they end with bit-equal weights."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crosslmm_jax.batch import AllOrNone, VisibleFrames
from crosslmm_jax.cli.app import build_parser, main
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import find_model_folder, load_processor
from crosslmm_jax.train import export, loop
from crosslmm_jax.train.export_run import _damaged
from crosslmm_jax.train.initial import check_same_model, warn_of_other_inputs
from crosslmm_jax.train.reporting.metrics_log import METRICS_FILE, read_metrics
from crosslmm_jax.train.reporting.run_log import LOG_FILE

STEPS, SAVE_EVERY = 80, 10

# ---- interrupted runs, each in a process ----


@pytest.fixture(scope="module")
def start(experiment, config_file, tmp_path_factory, one_device_flags):
    """`start(name)`: starts or resumes the run `name` by the command line, on one device."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {
        "XLA_FLAGS": one_device_flags,
        # Every process of this module compiles the same programs.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def begin(name: str) -> tuple[subprocess.Popen, Path]:
        config = experiment(folder / name, stage={"steps": STEPS}, save_every=SAVE_EVERY, log_every=1)
        command = [sys.executable, "-m", "crosslmm_jax.cli", "train", config_file(config)]
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return process, folder / name

    return begin


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Returns as soon as `step` is in the metrics."""
    limit = time.monotonic() + 240
    while not any(line["step"] >= step for line in read_metrics(out)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.02)  # reading more often would slow the run down


def weights_of(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(start) -> Path:
    process, out = start("uninterrupted")
    output = finish(process)
    assert f"{out}/model: a MODEL folder, trained for {STEPS} steps; next: crosslmm ask {out} " in output
    return out


def untimed(out: Path) -> list[dict]:
    """Lines of metrics without what is measured."""
    computed = ("step", "loss", "grad_norm", "targets", "faults", "truncated", "learning_rate", "gate")
    return [{key: line[key] for key in computed} for line in read_metrics(out)]


@pytest.mark.slow
def test_killed_twice_ends_with_the_same_bits(start, uninterrupted) -> None:
    for step in (25, 52):
        process, out = start("killed")
        wait_for_step(process, out, step)
        if step == 52:
            process.send_signal(signal.SIGSTOP)  # it would be at its end too soon
            second, _ = start("killed")  # by mistake
            message = second.communicate(timeout=240)[0]
            assert second.returncode == 2 and f"run.out {out}: process {process.pid} on host" in message
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "model").exists()
    process, out = start("killed")
    finish(process)
    assert weights_of(out) == weights_of(uninterrupted)
    assert untimed(out) == untimed(uninterrupted)
    assert [line["step"] for line in untimed(out)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigterm_saves_and_damage_is_survived(start, uninterrupted) -> None:
    process, out = start("terminated")
    wait_for_step(process, out, 33)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    newest = max(int(path.name) for path in (out / "checkpoints").iterdir())
    assert newest >= 33, "the step it was stopped at is saved"
    for file in (out / "checkpoints" / str(newest) / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    output = finish(start("terminated")[0])
    assert f"checkpoints/{newest} is damaged" in output
    assert weights_of(out) == weights_of(uninterrupted)


# ---- runs in this process, on eight devices ----


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    config = experiment(tmp_path_factory.mktemp("finished") / "run")
    return config, loop.train(config, quiet=True)


@pytest.mark.slow
def test_what_a_run_leaves(finished) -> None:
    config, result = finished
    out = Path(config.run.out)
    assert result.model_folder == out / "model"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", LOG_FILE, METRICS_FILE, "model"]
    assert [line["step"] for line in result.metrics] == [1, 2, 4, 6]
    line = result.metrics[-1]
    assert line["gate"].keys() == {"v2v", "t2v"}
    assert line["gate"]["v2v"].keys() == {"0"}
    assert line["learning_rate"].keys() == {"base", "encoder", "cross_attention", "gate"}
    for name in ("loss", "grad_norm", "targets", "step_seconds", "tokens_per_second"):
        assert line[name] > 0, name
    assert line["input_wait_seconds"] >= 0 and 0 <= line["input_wait_share"] <= 1
    assert line["faults"] == {}
    assert result.bad_rows == {}


@pytest.mark.slow
def test_a_step_counts_on_what_holds_for_its_batch(experiment, tmp_path, monkeypatch) -> None:
    """Each type of visible frames has a program of its own, compiled once and used for its batches."""
    types, asked, used, steps = iter([VisibleFrames, AllOrNone, VisibleFrames]), [], [], []

    def known(batch):
        asked.append(batch)
        return batch._replace(visible_frames=next(types)(batch.visible_frames.counts))

    def compile_step(config, stage, mesh):
        steps.append(real(config, stage, mesh))
        return lambda state, batch: used.append(type(batch.visible_frames)) or steps[0](state, batch)

    real = loop.compile_train_step
    monkeypatch.setattr(loop, "with_step_visibility", known)
    monkeypatch.setattr(loop, "compile_train_step", compile_step)
    loop.train(experiment(tmp_path, stage={"steps": 3}), quiet=True)
    assert used == [VisibleFrames, AllOrNone, VisibleFrames]
    assert len(steps) == 1 and steps[0]._cache_size() == 2
    assert all(batch.frames is not None for batch in asked)


@pytest.mark.slow
def test_repeating_a_finished_run_does_nothing(finished, monkeypatch) -> None:
    config, result = finished
    monkeypatch.setattr(loop, "compile_train_step", None)
    again = loop.train(config, quiet=True)
    assert again.resumed_step == config.stage.steps
    assert again.metrics == result.metrics


def next_command(said: str) -> list[str]:
    """The words of the command that an ending names, with a video and a question."""
    found = re.search(r"next: crosslmm (.*), or train a further stage with --run\.init-from (.*)", said)
    assert found, said
    model, words = shlex.split(found[2]), shlex.split(found[1])
    assert words[1:2] == model
    return words


@pytest.mark.slow
def test_a_finished_run_says_where_its_model_is(finished, config_file, capfd) -> None:
    config, result = finished
    assert main(["train", config_file(config)]) == 0
    said = capfd.readouterr().out
    assert said.startswith(
        f"{result.model_folder}: a MODEL folder, which an earlier command has trained for 6 steps; nothing"
    )
    args = build_parser().parse_args(next_command(said))
    assert args.command == "ask" and find_model_folder(args.model) == result.model_folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_model_of_any_checkpoint(finished, tmp_path, capfd) -> None:
    config, result = finished
    out = Path(config.run.out)
    assert main(["export", str(out), "--out", str(tmp_path / "newest")]) == 0
    assert files_of(tmp_path / "newest") == files_of(result.model_folder)
    tokenizer = tmp_path / "moved"
    shutil.copytree(config.data.tokenizer, tokenizer)
    assert main(["export", str(out), "--step", "4", "--tokenizer", str(tokenizer)]) == 0
    said = capfd.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{out}/model_4: a MODEL folder with the weights of step 4; next: crosslmm ask ")
    model = find_model_folder(next_command(said)[1])
    shutil.move(model, tmp_path / "earlier")
    earlier, last = files_of(tmp_path / "earlier"), files_of(result.model_folder)
    assert {name for name in last if earlier[name] != last[name]} == {"model.safetensors"}
    assert not (out / "owner.json").exists()
    check_same_model(tmp_path / "earlier", config.model)


@pytest.mark.slow
def test_what_cannot_be_exported(finished, tmp_path) -> None:
    config, _ = finished
    out = tmp_path / "run"
    shutil.copytree(Path(config.run.out) / "checkpoints", out / "checkpoints")
    with pytest.raises(UserError, match=f"this run has written no MODEL .* with `crosslmm export {out}`"):
        find_model_folder(out)
    with pytest.raises(UserError, match="has no checkpoint of step 5; --step takes 4 or 6"):
        export(out, step=5)
    with pytest.raises(UserError, match=f"{tmp_path}: holds no checkpoints; give the folder of a run"):
        export(tmp_path)
    with pytest.raises(UserError, match="no_such: the run's tokenizer is not there; name its .* --tokenizer"):
        export(out, tokenizer="no_such")
    other = tmp_path / "tokenizer"
    shutil.copytree(config.data.tokenizer, other)
    described = json.loads((other / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="tokenizer: is not the tokenizer that the run was trained with"):
        export(out, tokenizer=str(other))
    for path in (out / "checkpoints" / "6" / "state").glob("**/d/*"):
        content = bytearray(path.read_bytes())
        for position in range(0, len(content), 500):  # damage of the moments alone would not matter
            content[position] ^= 4
        path.write_bytes(content)
    with pytest.raises(UserError, match="checkpoints/6: damaged, or removed .*; choose --step 4"):
        export(out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints"]
    assert export(out, step=4).folder == out / "model_4"
    path = out / "checkpoints" / "4" / "checksums" / "metadata"
    path.write_text(json.dumps({name: value + 1 for name, value in json.loads(path.read_text()).items()}))
    with pytest.raises(UserError, match=r"checkpoints/4: damaged, .*\(checksums differ in "):
        export(out, step=4)


def test_export_names_what_is_left_when_a_run_removes_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "6").mkdir()
    assert str(_damaged(tmp_path / "4", FileNotFoundError())).endswith("; choose --step 6")
    assert str(_damaged(tmp_path / "6", FileNotFoundError())).endswith("; there is no other")


def test_another_config_in_the_same_folder(finished) -> None:
    config, _ = finished
    changed = dataclasses.replace(config, stage=dataclasses.replace(config.stage, learning_rate=0.5))
    with pytest.raises(UserError, match=r"stage\.learning_rate was 0\.01 and is 0\.5"):
        loop.train(changed, quiet=True)


@pytest.mark.slow
def test_next_stage_starts_from_a_model_folder(finished, experiment, tmp_path) -> None:
    _, result = finished
    stage = {"steps": 1, "warmup_ratio": 0.5, "trainable": ("decoder",), "directions": ()}
    config = experiment(tmp_path / "next", stage=stage, init_from=str(result.model_folder))
    after = loop.train(config, quiet=True)  # the only step is warm-up, with rate 0
    assert weights_of(after.model_folder.parent) == weights_of(result.model_folder.parent)
    written = json.loads((after.model_folder / "config.json").read_text())
    assert written["cross_attention"]["directions"] == []


@pytest.mark.slow
def test_frames_are_resized_in_training_as_the_model_says(experiment, finished, tmp_path) -> None:
    _, other = finished
    config = experiment(tmp_path / "run", init_from=str(other.model_folder), stage={"steps": 1})
    data = dataclasses.replace(config.data, resampling="bilinear")
    seen, bicubic = (
        loop._open_dataset(dataclasses.replace(config, data=choice)).batch([0]).frames
        for choice in (data, config.data)
    )
    assert not np.array_equal(seen, bicubic)
    result = loop.train(dataclasses.replace(config, data=data), quiet=True)
    found = [load_processor(model).resampling for model in (other.model_folder, result.model_folder)]
    assert found == ["bicubic", "bilinear"]


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("decoder", {"rope_theta": 5e5}, "decoder.rope_theta is {}, in model of the run it is 500000.0"),
        ("decoder", {"rms_norm_eps": 1e-5}, "decoder.rms_norm_eps is {}, in model of the run it is 1e-05"),
        (
            "vision",
            {"image_mean": (0.4, 0.5, 0.6)},
            "vision.image_mean is {}, in model of the run it is (0.4,",
        ),
        ("vision", {"image_std": (0.2, 0.3, 0.4)}, "vision.image_std is {}, in model of the run it is (0.2,"),
        (
            "decoder",
            {"num_heads": 2, "num_kv_heads": 2},
            "decoder.num_heads is {}, in model of the run it is 2",
        ),
        (
            "cross_attention",
            {"cross_attn_offset": 1},
            "cross_attention_layers is (0,), in model of the run it is",
        ),
        ("vision", {"post_layernorm": True}, "vision.post_layernorm is {}, in model of the run it is True"),
        (
            "cross_attention",
            {"kv_source": "encoder"},
            "cross_attention.kv_source is {}, in model of the run it is encoder",
        ),
        (
            "cross_attention",
            {"gate_init": -0.25},
            "cross_attention.gate_init is {0}, in model of the run it is -0.25; existing weights keep"
            " their initial values: set model.cross_attention.gate_init to {0}, or make the folder with"
            " `crosslmm convert from-hf ... --cross-attention.gate-init -0.25`",
        ),
        (
            "cross_attention",
            {"cross_attn_init": "fresh"},
            "cross_attention.cross_attn_init is {}, in model of the run it is fresh; existing weights",
        ),
    ],
)
def test_another_model_to_start_from(finished, experiment, tmp_path, part, changes, message) -> None:
    _, result = finished
    config = experiment(tmp_path / "run", init_from=str(result.model_folder))
    before = getattr(config.model, part)
    model = dataclasses.replace(config.model, **{part: dataclasses.replace(before, **changes)})
    with pytest.raises(ConfigError) as error:
        loop.train(dataclasses.replace(config, model=model), quiet=True)
    assert message.format(getattr(before, next(iter(changes)))) in str(error.value)
    assert str(result.model_folder / "config.json") in str(error.value)


def test_what_a_stage_may_choose_anew(finished, experiment, tmp_path) -> None:
    _, result = finished
    config = experiment(tmp_path / "run", init_from=str(result.model_folder))
    vision = dataclasses.replace(config.model.vision, keep_features=True)
    cross = dataclasses.replace(config.model.cross_attention, v2v_scope="frame", directions=("v2v",))
    check_same_model(
        result.model_folder, dataclasses.replace(config.model, vision=vision, cross_attention=cross)
    )


def test_frames_read_otherwise_than_for_the_weights_are_warned_of(
    finished, experiment, tmp_path, caplog
) -> None:
    _, result = finished
    data, folder = experiment(tmp_path / "run").data, tmp_path / "model"
    shutil.copytree(result.model_folder, folder)
    warn_of_other_inputs(folder, dataclasses.replace(data, time_instruction="short"))
    assert caplog.messages == []
    path = folder / "processor.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"time_instruction": "full", "resampling": "bilinear"})
    )
    warn_of_other_inputs(folder, dataclasses.replace(data, time_instruction="full"))
    (message,) = caplog.messages
    assert (
        f"{path}: resampling is bilinear, DataConfig.resampling of the run is bicubic; set it to" in message
    )


@pytest.mark.slow
def test_loss_that_is_not_finite(experiment, tmp_path) -> None:
    """Earlier checkpoints stay, the batch is saved, and nothing is written afterwards."""
    config = experiment(tmp_path / "run", stage={"learning_rate": 1e30, "warmup_ratio": 0.5}, save_every=1)
    with pytest.raises(UserError, match="not finite at step") as error:
        loop.train(config, quiet=True)
    out = Path(config.run.out)
    (dump,) = out.glob("nonfinite_step_*.npz")
    bad = int(dump.stem.split("_")[-1])
    steps = [int(path.name) for path in (out / "checkpoints").iterdir()]
    assert max(steps) == bad - 1
    assert not (out / "model").exists()
    assert all(np.isfinite(line["loss"]) for line in read_metrics(out))
    with np.load(dump) as batch:
        assert batch["frames"].shape == (8, 4, 16, 16, 3)
        assert str([int(row) for row in batch["row_index"]]) in str(error.value)


def almost_full(path: object):
    """`shutil.disk_usage` of a disk that is almost full."""
    return type("Usage", (), {"free": 1000})


def test_full_disk_is_noticed_before_the_first_step(experiment, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", almost_full)
    with pytest.raises(UserError, match=r"run\.out .*free space"):
        loop.train(experiment(tmp_path / "run"), quiet=True)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("data", {"batch_size": 12}, "batch_size is 12"),
        ("data", {"text_buckets": (4096,)}, "max_positions is 2048"),
        ("data", {"index": "missing"}, "missing: no index; make it with `crosslmm data index"),
        ("run", {"init_from": "no/such/model"}, "no/such/model"),
    ],
)
def test_mistakes_are_found_early(experiment, tmp_path, part: str, changes: dict, message: str) -> None:
    config = experiment(tmp_path / "run")
    changed = dataclasses.replace(getattr(config, part), **changes)
    with pytest.raises(UserError, match=message):
        loop.train(dataclasses.replace(config, **{part: changed}), quiet=True)


def test_hosts_with_other_copies_of_the_index_end_before_anything_is_saved(
    experiment, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(loop, "gather", lambda settings: [settings, settings | {"index_digest": "other"}])
    with pytest.raises(ConfigError, match=r"index_digest is '.*' on process 0 and 'other' on process 1"):
        loop.train(experiment(tmp_path / "run"), quiet=True)
    assert list((tmp_path / "run").iterdir()) == []


def test_vocabulary_must_hold_the_tokenizer(experiment, tmp_path) -> None:
    config = experiment(tmp_path / "run")
    decoder = dataclasses.replace(config.model.decoder, vocab_size=64)
    model = dataclasses.replace(config.model, decoder=decoder)
    with pytest.raises(UserError, match="vocab_size is 64; it must be at least"):
        loop.train(dataclasses.replace(config, model=model), quiet=True)
