"""Held-out rows while a run trains: which they are, what is computed of them, and the best checkpoint."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax.batch import needed
from crosslmm_jax.config import DataConfig, ExperimentConfig, ModelConfig, ValidationConfig
from crosslmm_jax.data.batching.held_out import uniform
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.loading import Dataset, open_held_out
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model import CrossLMM, apply, init_params, logits_of
from crosslmm_jax.model_folder import load_weights
from crosslmm_jax.train import export, loop
from crosslmm_jax.train.reporting import read_log, read_metrics
from crosslmm_jax.train.step import compile_scores


@pytest.fixture(scope="module")
def held_out_index(files) -> str:
    """An index of the rows that `files` does not train on."""
    rows, folder = files / "data" / "heldout.json", files / "held_out"
    build_index(str(rows), folder, tokenizer=str(files / "tokenizer"), quiet=True)
    return str(folder)


@pytest.fixture(scope="module")
def validating(experiment):
    """`validating(out, ValidationConfig fields, **run)`: an experiment that validates."""

    def make(out: Path, validation: dict, **fields) -> ExperimentConfig:
        config = experiment(out, **fields)
        data = dataclasses.replace(config.data, validation=ValidationConfig(**validation))
        return dataclasses.replace(config, data=data)

    return make


def dataset_of(config: ExperimentConfig) -> Dataset:
    return Dataset(config.data, tokens_per_frame=1, image_size=config.model.vision.image_size)


def scores_by_row(model: ModelConfig, params: dict, data: DataConfig, rows: list[int]) -> tuple[float, float]:
    """Loss and accuracy of rows of `data.index`, from the logits of all their tokens."""
    dataset, loss, hits, count = Dataset(data, tokens_per_frame=1, image_size=16), 0.0, 0, 0
    whole = CrossLMM(model)

    def logits(method: CrossLMM, batch) -> jax.Array:
        hidden = method.hidden(method.encode(batch.frames), batch)
        return logits_of(hidden, method.decoder.head())

    compute = jax.jit(lambda params, batch: apply(whole, params, logits, batch))
    for first in range(0, len(rows), 8):
        batch = dataset.batch(rows[first : first + 8])
        log_p = np.asarray(jax.nn.log_softmax(compute(params, batch), axis=-1))
        for b, t in zip(*np.nonzero(needed(batch.loss_mask, "loss_mask")), strict=True):
            target = batch.tokens[b, t]
            loss -= float(log_p[b, t - 1, target])
            hits += int(log_p[b, t - 1].argmax() == target)
            count += 1
    return loss / count, hits / count


def test_a_share_is_held_out_whatever_the_seed(validating, tmp_path) -> None:
    config = validating(tmp_path, {"share": 0.25})
    seen: list[set[int]] = []
    for seed in (0, 1):
        data = dataclasses.replace(config.data, seed=seed)
        dataset = dataset_of(dataclasses.replace(config, data=data))
        held = {int(row) for rows in dataset.held_out_rows for row in rows}
        trained = {int(row) for step in range(30) for row in dataset.scheduled(step).rows}
        assert held and trained and not held & trained
        assert held | trained == set(range(len(dataset.rows)))
        seen.append(held)
    assert seen[0] == seen[1]


def test_random_numbers_of_rows_are_uniform() -> None:
    numbers = uniform(np.arange(100_000))
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert counts.sum() == 100_000 and abs(counts / 5000 - 1).max() < 0.05
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_every_held_out_row_is_read_once_on_any_number_of_hosts(validating, held_out_index, tmp_path) -> None:
    rows = open_held_out(dataset_of(validating(tmp_path, {"index": held_out_index, "rows": 13})))
    assert rows is not None and rows.num_rows == 13
    alone = list(rows.batches())
    assert [batch.tokens.shape for batch in alone] == [(8, 100), (8, 100)]
    read = np.concatenate([needed(batch.row_index, "row_index") for batch in alone])
    assert len(set(read[:13].tolist())) == 13 and set(read[13:].tolist()) == {-1}
    assert not needed(alone[1].loss_mask, "loss_mask")[5:].any(), "rows that fill the batch have no target"
    parts = [list(rows.batches(shard_index=index, shard_count=4)) for index in range(4)]
    for number, batch in enumerate(alone):
        for name, array in batch.arrays().items():
            shared = np.concatenate([part[number].arrays()[name] for part in parts])
            np.testing.assert_array_equal(array, shared, err_msg=name)


def test_a_held_out_row_that_cannot_be_read_is_left_out(validating, files, tmp_path, caplog) -> None:
    data = tmp_path / "data"
    shutil.copytree(files / "data", data)
    index = tmp_path / "index"
    build_index(str(data / "heldout.json"), index, tokenizer=str(files / "tokenizer"), quiet=True)
    config = validating(tmp_path, {"index": str(index)})
    rows = open_held_out(dataset_of(config))
    assert rows is not None
    targets = [needed(batch.loss_mask, "loss_mask").sum() for batch in rows.batches()]
    (data / "videos" / "heldout_00000.mp4").unlink()
    left = [needed(batch.loss_mask, "loss_mask").sum() for batch in rows.batches()]
    assert 0 < sum(left) < sum(targets)
    assert "is left out (missing)" in caplog.text


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"index": "no/such/index"}, "no/such/index"),
        ({"share": 1e-9}, "by which no row of .* is held out; raise it"),
    ],
)
def test_what_cannot_be_validated_on(validating, tmp_path, validation, message) -> None:
    with pytest.raises(UserError, match=message):
        open_held_out(dataset_of(validating(tmp_path, validation)))


def test_either_an_index_or_a_share() -> None:
    with pytest.raises(ConfigError, match="ValidationConfig.share is 0.1; it must be 0 with an index"):
        ValidationConfig(index="x", share=0.1)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_scores_equal_those_of_all_logits(
    experiment, held_out_index, tmp_path, one_device, microbatches
) -> None:
    config = experiment(tmp_path, stage={"microbatches": microbatches})
    model = config.model
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(1))
    data = dataclasses.replace(config.data, index=held_out_index)
    batch = Dataset(data, tokens_per_frame=1, image_size=16).batch(list(range(8)))
    with jax.set_mesh(one_device):
        scores = compile_scores(model, config.stage, one_device)(params, jax.tree.map(jnp.asarray, batch))
    loss, accuracy = scores_by_row(model, params, data, list(range(8)))
    assert float(scores.loss / scores.weight) == pytest.approx(loss, abs=1e-5)
    assert float(scores.hits / scores.weight) == accuracy


@pytest.fixture(scope="module")
def validated(validating, held_out_index, tmp_path_factory):
    """A run whose learning rate makes it worse again at its end, so that the best step is not the last."""
    out = tmp_path_factory.mktemp("validated") / "run"
    config = validating(
        out, {"index": held_out_index, "every": 2}, save_every=4, keep_checkpoints=1,
        stage={"steps": 8, "warmup_ratio": 0.8, "learning_rate": 0.6},
    )  # fmt: skip
    return config, loop.train(config, quiet=True)


@pytest.mark.slow
def test_a_run_validates_and_keeps_its_best_checkpoint(validated, held_out_index) -> None:
    config, result = validated
    out = Path(config.run.out)
    lines = [line for line in read_metrics(out) if "validation" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    losses = {line["step"]: line["validation"]["loss"] for line in lines}
    best = min(losses, key=losses.__getitem__)
    assert best != 8, "or this test says nothing"
    assert sorted(int(path.name) for path in (out / "checkpoints").iterdir()) == sorted({best, 8})
    events = [event for event in read_log(out) if event["event"] == "validated"]
    assert [event["step"] for event in events if event["best"]][-1] == best
    assert export(out, best=True).step == best
    params = load_weights(out / f"model_{best}", config.model, dtype="float32")
    data = dataclasses.replace(config.data, index=held_out_index)
    (line,) = (line["validation"] for line in lines if line["step"] == best)
    loss, accuracy = scores_by_row(config.model, params, data, list(range(line["rows"])))
    assert line["loss"] == pytest.approx(loss, abs=1e-5)
    assert line["accuracy"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_a_run_that_resumes_remembers_its_best(validated, tmp_path) -> None:
    config, _ = validated
    before, out = Path(config.run.out), tmp_path / "run"
    shutil.copytree(before / "checkpoints", out / "checkpoints")
    shutil.rmtree(out / "checkpoints" / "8")
    (best,) = (int(path.name) for path in (out / "checkpoints").iterdir())
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(out)))
    result = loop.train(resumed, quiet=True)
    assert result.resumed_step == best
    assert sorted(int(path.name) for path in (out / "checkpoints").iterdir()) == sorted({best, 8})
    weights = [folder / "model" / "model.safetensors" for folder in (before, out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
