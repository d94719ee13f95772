"""Worker processes end with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crosslmm_jax.data.index import build_index
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.utils.workers import worker_pool

# Each prints the ids of its worker processes, then waits.
POOL = """
import os, time
from crosslmm_jax.utils.workers import worker_pool

if __name__ == "__main__":
    print(worker_pool(1).submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""
TRAINING = """
import multiprocessing, sys, time
from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.loading.loader import BatchIterator
from crosslmm_jax.data.loading.dataset import Dataset

if __name__ == "__main__":
    config = DataConfig(
        index=sys.argv[1], tokenizer=sys.argv[2], batch_size=4, num_workers=2,
        sampling=SamplingConfig(frames=2),
    )
    batches = BatchIterator(Dataset(config, tokens_per_frame=1, image_size=32))
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def test_ctrl_c_is_left_to_the_parent() -> None:
    with worker_pool(1) as pool:
        os.kill(pool.submit(os.getpid).result(), signal.SIGINT)
        assert pool.submit(len, "alive").result() == 5


@pytest.fixture(scope="module")
def index_and_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What a training run reads its data from."""
    folder = tmp_path_factory.mktemp("data")
    videos = write_dataset(folder / "set", num_train=16, num_heldout=8, seed=3)
    write_default_tokenizer(folder / "tokenizer")
    build_index(str(videos.train), folder / "index", tokenizer=str(folder / "tokenizer"), quiet=True)
    return folder / "index", folder / "tokenizer"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("script", [POOL, TRAINING], ids=["pool", "training"])
def test_no_worker_outlives_a_killed_process(
    script: str, index_and_tokenizer: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "left_alone.py"
    file.write_text(script)
    words = [sys.executable, str(file), *map(str, index_and_tokenizer)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert workers and all(map(_runs, workers))
    os.kill(process.pid, signal.SIGKILL)  # of this process alone, as when memory runs out
    process.wait()
    process.stdout.close()
    limit = time.monotonic() + 30
    while any(map(_runs, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    left = list(filter(_runs, workers))
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def _runs(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
