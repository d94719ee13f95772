"""Real processes: one host, one with two workers, and two with a worker each read the same batches."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from host_process import IMAGE_SIZE, TOKENS_PER_FRAME, row_digests

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.config_io import to_dict
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.loader import BatchIterator
from crosslmm_jax.demo.synthetic import SyntheticSet

PROGRAM = Path(__file__).parents[1] / "host_process.py"
BATCHES, STOP, BATCH_SIZE = 150, 71, 8


@pytest.fixture
def config(synthetic: SyntheticSet, tokenizer_folder: Path, tmp_path: Path, make_index) -> DataConfig:
    lines = [
        f"  - {{json_path: {path}}}" for path in (synthetic.train, synthetic.dialogues, synthetic.captions)
    ]
    (tmp_path / "mixture.yaml").write_text("\n".join(["datasets:", *lines]))
    return DataConfig(
        index=str(make_index(tmp_path / "mixture.yaml")), tokenizer=str(tokenizer_folder),
        batch_size=BATCH_SIZE, sampling=SamplingConfig(frames=4), time_instruction="short", frame_cache_mb=8,
        max_shapes=4,
    )  # fmt: skip


class Hosts:
    """Processes of one run, started at once."""

    def __init__(
        self, folder: Path, config: DataConfig, port: int, *, hosts: int, workers: int, begin: int
    ) -> None:
        self.results = [folder / f"{hosts}x{workers}-{begin}-{number}.json" for number in range(hosts)]
        settings = folder / f"{hosts}x{workers}.json"
        settings.write_text(json.dumps(to_dict(dataclasses.replace(config, num_workers=workers))))
        self.processes = []
        for number, result in enumerate(self.results):
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
            if hosts > 1:
                environment |= {
                    "COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": str(hosts),
                    "PROCESS_ID": str(number),
                }  # fmt: skip
            command = [sys.executable, str(PROGRAM), str(settings), str(begin), str(BATCHES), str(result)]
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self.processes.append(process)

    def join(self) -> tuple[list[list[str]], list[dict[str, Any]]]:
        """Digests of the rows of each global batch, the parts of all hosts one after the other."""
        for process in self.processes:
            output = process.communicate(timeout=240)[0]
            assert process.returncode == 0, output[-3000:]
        parts = [json.loads(result.read_text()) for result in self.results]
        assert {part["hosts"] for part in parts} == {len(parts)}
        assert {part["state"]["global_next_index"] for part in parts} == {BATCHES * BATCH_SIZE}
        batches = zip(*(part["batches"] for part in parts), strict=True)
        return [sum(rows, []) for rows in batches], parts


@pytest.mark.slow
@pytest.mark.multihost
def test_batches_are_the_same_for_any_layout(config: DataConfig, tmp_path: Path, free_port) -> None:
    """And a run that stops at batch 71 goes on the same under another layout, from one integer."""
    running = [
        Hosts(tmp_path, config, free_port(), hosts=1, workers=2, begin=0),
        Hosts(tmp_path, config, free_port(), hosts=2, workers=1, begin=0),
    ]
    dataset = Dataset(config, tokens_per_frame=TOKENS_PER_FRAME, image_size=IMAGE_SIZE)
    assert len({(bucket.frames, bucket.text) for bucket in dataset.buckets}) > 1
    iterator = BatchIterator(dataset)
    expected, rows, state = [], [], {}
    for number in range(BATCHES):
        if number == STOP:
            state = iterator.get_state()
        batch = next(iterator)
        expected.append(row_digests(batch))
        rows.append(batch.row_index.tolist())
    iterator.close()
    for hosts in running:
        assert hosts.join()[0] == expected
    assert state == {"global_next_index": STOP * BATCH_SIZE}
    resumed, parts = Hosts(tmp_path, config, free_port(), hosts=2, workers=0, begin=STOP).join()
    assert resumed == expected[STOP:]
    # What jax holds of a global batch is where it belongs.
    for part in parts:
        for batch, placed in zip(rows[STOP:], part["placed"], strict=False):
            assert placed and all(batch[int(b) :][: len(held)] == held for b, held in placed.items())
    iterator = BatchIterator(dataset, **state)
    assert [row_digests(next(iterator)) for _ in range(50)] == expected[STOP : STOP + 50]
    iterator.close()
