"""Worker processes end with the process that started them, however that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crosslmm_jax.data.index import build_index
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.utils.workers import map_in_order

# Each prints the ids of its worker processes, then waits.
POOL = """
import os, time
from crosslmm_jax.utils.workers import map_in_order

def process_id(_):
    return os.getpid()

if __name__ == "__main__":
    results = map_in_order(process_id, range(9), workers=1, if_one_dies="")
    print(next(results), flush=True)
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
    next(batches), next(batches)  # the second is made by a worker
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


class Work:
    """Gives (process, task) after `task` tenths of a second; a task below 0 ends its process."""

    def __init__(self) -> None:
        self.copies = 0

    def __reduce__(self) -> tuple[type["Work"], tuple[()]]:
        self.copies += 1
        return Work, ()

    def __call__(self, task: int) -> tuple[int, int]:
        if task < 0:
            os._exit(1)
        time.sleep(task / 10)
        return os.getpid(), task


def test_results_come_in_the_order_of_the_tasks_which_are_read_as_needed() -> None:
    read = []

    def tasks() -> Iterator[int]:
        for task in (9, 0, 1, 0, 0, 1, 0, 0):
            read.append(task)
            yield task

    work = Work()
    results = map_in_order(work, tasks(), workers=2, spare=2, if_one_dies="")
    assert read == []
    first = next(results)
    assert len(read) == 4, "one per worker, and two to spare"
    found = [first, *results]
    assert [task for _, task in found] == read
    assert os.getpid() not in {process for process, _ in found}
    assert work.copies == 2, "one for each process, not for each task"


@pytest.mark.parametrize(("tasks", "workers"), [([], 4), ([0], 4), ([0, 0, 0], 0)])
def test_no_process_is_started_for_one_task(tasks: list[int], workers: int) -> None:
    found = list(map_in_order(Work(), tasks, workers=workers, if_one_dies=""))
    assert found == [(os.getpid(), task) for task in tasks]


def test_a_worker_that_dies_is_an_error_after_the_results_before_it() -> None:
    results = map_in_order(Work(), [0, -1, 0], workers=1, spare=0, if_one_dies="take fewer")
    assert next(results)[1] == 0
    with pytest.raises(UserError, match="a worker process died, perhaps out of memory; take fewer"):
        list(results)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_left_to_the_parent() -> None:
    results = map_in_order(Work(), [0, 0, 0], workers=1, spare=0, if_one_dies="")
    process = next(results)[0]
    os.kill(process, signal.SIGINT)
    assert [one for one, _ in results] == [process, process]


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
