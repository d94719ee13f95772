"""A disk that is full while a run writes to it: one line, exit code 2, and the same command goes on."""

import json
import shutil
from pathlib import Path

import pytest

from crosslmm_jax.cli.app import main
from crosslmm_jax.train import loop
from crosslmm_jax.train.reporting.metrics_log import read_metrics


@pytest.fixture
def fill_before(monkeypatch, fill):
    """`fill_before(name, disk)`: the disk is full once the loop calls its function `name`."""

    def arrange(name: str, disk: Path) -> None:
        real = getattr(loop, name)

        def filling(*arguments):
            fill(disk)
            monkeypatch.setattr(loop, name, real)
            return real(*arguments)

        monkeypatch.setattr(loop, name, filling)

    return arrange


@pytest.mark.slow
def test_a_run_on_a_disk_that_fills(experiment, config_file, mount_disk, fill_before, capfd, caplog) -> None:
    disk = mount_disk(kilobytes=16_000)
    out = disk / "run"
    words = ["train", config_file(experiment(out, save_every=3, log_every=1, tensorboard=True))]

    def error() -> str:
        lines = capfd.readouterr().err.splitlines()
        (said,) = (line for line in lines if not line.startswith("test: "))  # but for the progress
        return said

    fill_before("compile_train_step", disk)
    assert main(words) == 2
    expected = f"{out}/checkpoints: a checkpoint was not written (No space left on device); free space there"
    assert error().startswith(f"crosslmm: error: {expected}")
    warned = [message.split(" cannot be written (No space")[0] for message in caplog.messages]
    assert len(set(warned)) == len(warned)
    # What log.jsonl gets may still fit in the block that it has.
    assert set(warned) - {f"{out}/log.jsonl"} == {f"{out}/metrics.jsonl", f"{out}/tensorboard"}
    assert not (out / "owner.json").exists()

    (disk / "filler").unlink()
    assert main(words) == 0
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4, 5, 6]

    shutil.rmtree(out / "model")
    fill_before("_open_dataset", disk)
    assert main(words) == 2
    assert error().startswith(f"crosslmm: error: {out}/model: cannot be written (No space left on device)")
    assert not (out / "model").exists()

    (disk / "filler").unlink()
    assert main(words) == 0
    assert json.loads((out / "model" / "config.json").read_text())


def test_a_batch_that_cannot_be_saved(mount_disk, fill, make_batch, tiny_config) -> None:
    disk, batch = mount_disk(kilobytes=64), make_batch(tiny_config)
    fill(disk)
    path = disk / "nonfinite_step_3.npz"
    assert loop.save_batch(path, batch) == (
        f"the batch could not be saved in {path} (No space left on device)"
    )
    assert not path.exists()
