"""`data check`: the message when a worker process dies, and the deadline for one file."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from crosslmm_jax.cli.app import main
from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.loading import example as loader
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.reports import check
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.errors import UserError


def test_faults_found_before_a_worker_died_are_printed(
    tmp_path, make_index, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = write_dataset(tmp_path / "set", num_train=8, num_heldout=4, seed=1)
    index = make_index(videos.train)
    (videos.folder / "videos/train_00000.mp4").write_text("no video")

    def dying(function: Callable[[Any], Any], chunks: Iterator[Any], **options: Any) -> Iterator[Any]:
        yield function(next(chunks))
        raise UserError(f"a worker process died; {options['if_one_dies']}")

    monkeypatch.setattr(check, "map_in_order", dying)
    assert main(["data", "check", str(index), "--workers", "1"]) == 2
    out, error = capsys.readouterr()
    assert [line.split("\t")[:2] for line in out.splitlines()] == [
        [f"row {n}", "wrong_type"] for n in range(4)
    ]
    assert "a worker process died; check again with fewer --workers" in error


def test_the_deadline_is_the_same_for_training_and_check(
    synthetic, make_index, tokenizer_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = str(make_index(synthetic.train))
    given: list[float | None] = []
    for module in (check, loader):
        real = module.read_frames

        def noting(*arguments: Any, deadline_s: float | None, real: Any = real, **options: Any) -> Any:
            given.append(deadline_s)
            return real(*arguments, deadline_s=deadline_s, **options)

        monkeypatch.setattr(module, "read_frames", noting)
    for limit in (1800.0, None, 9.0):
        config = DataConfig(index=index, tokenizer=str(tokenizer_folder), batch_size=4, deadline_s=limit)
        dataset = Dataset(config, tokens_per_frame=1, image_size=16)
        dataset.loader.load(0, dataset.buckets[dataset.bucket_numbers([0])[0]])
    assert given == [DataConfig.deadline_s, None, 9.0]
    given.clear()
    words = ["data", "check", index, "--workers", "0", "--sample", "1"]
    assert [main(words), main([*words, "--deadline-s", "9"])] == [0, 0] and given == [1800.0, 9.0]
