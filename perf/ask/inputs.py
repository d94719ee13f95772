"""`crosslmm data index` of a few clips, in CPU seconds; and how long training waits for its first batch."""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.profiling import Record, Request, Row, timing
from crosslmm_jax.profiling.inputs import config_of
from crosslmm_jax.utils import kill_with_parent

BATCH = 16  # rows, as in the project's measured steps
QUESTIONS = 8  # rows per video: a batch needs BATCH of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputRequest(Request):
    """Videos that are indexed with the tokenizer of a MODEL folder, then read as training reads them."""

    what: Literal["index", "first batch"]
    model: str
    videos: str
    work: str
    workers: int


def run(record: Record) -> None:
    """One row: the index, or the first batch of an index that is made first."""
    request = record.request
    assert isinstance(request, InputRequest)
    write_rows(request)
    record.add_row(
        index(request, Path(request.work) / "index") if request.what == "index" else first_batch(request)
    )
    if request.what != "index":
        record.add_facts(**timing.device_facts())


def write_rows(request: InputRequest) -> None:
    """Writes the annotation file: QUESTIONS rows per video. Raises a UserError without videos."""
    files = sorted(Path(request.videos).absolute().glob("*.mp4"))
    if not files:
        raise UserError(f"--videos {request.videos}: holds no .mp4 file; name another folder")
    rows = [
        {
            "video": file.name,
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat happens in part {number}?"},
                {"from": "gpt", "value": "Somebody walks through the picture from left to right."},
            ],
        }
        for file in files
        for number in range(QUESTIONS)
    ]
    (Path(request.work) / "rows.json").write_text(json.dumps(rows))


def index(request: InputRequest, out: Path) -> Row:
    """Runs `crosslmm data index` into a new folder `request.repeats` times; the medians of its seconds.

    CPU seconds are those of the command and of all its workers, start included.
    """
    words = ["data", "index", str(Path(request.work) / "rows.json"), "--tokenizer", request.model]
    words += ["--media-root", request.videos, "--workers", str(request.workers), "--out"]
    runs = []
    for number in range(request.repeats):
        before, begin = cpu_of_children(), time.perf_counter()
        target = out.with_name(f"{out.name}-{time.time_ns()}-{number}")
        done = subprocess.run(
            [sys.executable, "-m", "crosslmm_jax.cli", *words, str(target)], capture_output=True, text=True,
            check=False, preexec_fn=kill_with_parent,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        runs.append((cpu_of_children() - before, time.perf_counter() - begin))
    if not out.exists():
        target.rename(out)
    cpu, wall = (statistics.median(values) for values in zip(*runs, strict=True))
    return {
        "what": f"data index, {request.workers} workers", "ms": 1e3 * wall, "cpu_s": cpu,
        "samples_cpu_s": [one for one, _ in runs], "clips": len(list(Path(request.videos).glob("*.mp4"))),
    }  # fmt: skip


def cpu_of_children() -> float:
    """CPU seconds, of the user and of the system, of all processes that ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_batch(request: InputRequest) -> Row:
    """Seconds from the start of the loader to the first batch on the device, in a process that has jax.

    As in training: opening the rows comes before, and is beside it in the row.
    """
    import jax

    from crosslmm_jax.data.loading import BatchIterator, Dataset

    folder = Path(request.work) / "index"
    if not folder.exists():
        index(dataclasses.replace(request, repeats=1), folder)
    jax.block_until_ready(jax.numpy.zeros(1))
    config = config_of(request)
    data = DataConfig(
        index=str(folder), tokenizer=request.model, batch_size=BATCH, num_workers=min(request.workers, BATCH),
        sampling=SamplingConfig(frames=request.frames[0]),
    )  # fmt: skip
    begin = time.perf_counter()
    dataset = Dataset(
        data, tokens_per_frame=config.merge.tokens_per_frame, image_size=config.vision.image_size
    )
    opened = time.perf_counter()
    iterator = BatchIterator(dataset)
    batch = next(iterator)
    there = time.perf_counter()
    jax.block_until_ready(jax.device_put(batch.frames))
    on_device = time.perf_counter()
    next(iterator)
    second = time.perf_counter()  # workers end with this process: closing them first takes a minute
    return {
        "what": f"first batch of {BATCH} rows, {data.num_workers} workers", "frames": request.frames[0],
        "ms": 1e3 * (on_device - opened), "open_s": opened - begin, "first_batch_s": there - opened,
        "second_batch_s": second - on_device,
    }  # fmt: skip
