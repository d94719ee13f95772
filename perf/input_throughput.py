"""Frames per second that the input pipeline delivers here, and how long training steps wait for them.

Nothing is cached: every frame of every batch is decoded. Training runs `crosslmm train` on the `tiny` preset
in another process, on the same cores as the workers that decode.
"""

import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.index.build import build_index
from crosslmm_jax.data.loading.dataset import Dataset
from crosslmm_jax.data.loading.loader import BatchIterator
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.profiling import Row
from perf.clips import GOP, HEIGHT, RATE, WIDTH, write_clip
from perf.command import parser_of

VIDEOS, SECONDS = 16, 20
IMAGE_SIZE, BATCH, PREFETCH = 384, 4, 4
FRAMES = (8, 64)  # per video
WARM_STEPS = 20  # steps that compile, and those whose batches were fetched meanwhile
_TRAINING = """
    from crosslmm_jax.config import (
        PARTS, DataConfig, ExperimentConfig, RunConfig, SamplingConfig, StageConfig,
    )
    from crosslmm_jax.presets import tiny

    def get_config():
        return ExperimentConfig(
            model=tiny(),
            data=DataConfig(
                index={index!r}, tokenizer={tokenizer!r}, batch_size={batch}, num_workers={workers},
                prefetch={prefetch}, sampling=SamplingConfig(frames={frames}),
            ),
            stage=StageConfig(
                name="throughput", trainable=PARTS, directions=("v2v", "t2v"), steps={steps},
                learning_rate=1e-3,
            ),
            run=RunConfig(out={out!r}, log_every=1, save_every={steps}, tensorboard=False),
        )
"""


def write_set(folder: Path) -> None:
    """Writes VIDEOS h264 files of moving texture."""
    for number in range(VIDEOS):
        write_clip(folder / f"{number}.mp4", seconds=SECONDS, seed=number)


def index_set(folder: Path, media: Path) -> None:
    """Writes an index to `folder` with a row for each mp4 file of `media`; a UserError if there is none."""
    names = sorted(path.name for path in media.glob("*.mp4"))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    rows = [{"video": name, "conversations": turns} for name in names]
    if not rows:
        raise UserError(f"--videos {media}: holds no .mp4 file; name another folder")
    (folder / "rows.json").write_text(json.dumps(rows))
    write_default_tokenizer(folder / "tokenizer")
    build_index(
        str(folder / "rows.json"), folder / "index", tokenizer=str(folder / "tokenizer"),
        media_root=str(media), quiet=True,
    )  # fmt: skip


def measure(folder: Path, *, frames: int, workers: int, batches: int) -> Row:
    """Frames per second after the first batches, which were prefetched."""
    config = DataConfig(
        index=str(folder / "index"), tokenizer=str(folder / "tokenizer"), batch_size=BATCH,
        sampling=SamplingConfig(frames=frames), num_workers=workers, prefetch=PREFETCH,
    )  # fmt: skip
    iterator = BatchIterator(Dataset(config, tokens_per_frame=9, image_size=IMAGE_SIZE))
    for _ in range(PREFETCH + 1):
        next(iterator)
    begin = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - begin
    iterator.close()
    return {"frames": frames, "workers": workers, "frames_per_second": batches * BATCH * frames / seconds}


def measure_training(folder: Path, *, frames: int, workers: int, steps: int) -> Row:
    """Seconds per step of `tiny` after the first WARM_STEPS, and the share in which it waits for input."""
    out = folder / f"run{frames}"
    text = textwrap.dedent(_TRAINING).format(
        index=str(folder / "index"), tokenizer=str(folder / "tokenizer"), batch=BATCH, workers=workers,
        prefetch=PREFETCH, frames=frames, steps=WARM_STEPS + steps, out=str(out),
    )  # fmt: skip
    config = folder / f"train{frames}.py"
    config.write_text(text, encoding="utf-8")
    subprocess.run([sys.executable, "-m", "crosslmm_jax.cli", "train", str(config)], check=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][WARM_STEPS:]
    seconds = sum(line["step_seconds"] for line in lines)
    waited = sum(line["input_wait_seconds"] for line in lines)
    return {
        "frames": frames, "workers": workers, "steps": len(lines), "step_seconds": seconds / len(lines),
        "input_wait_share": waited / seconds,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Measures FRAMES frames per video and writes JSON."""
    parser = parser_of("input_throughput", __doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batches", type=int, default=20, help="timed batches, and steps of training")
    parser.add_argument("--videos", type=Path, help="folder of .mp4 files; default: some are made")
    parser.add_argument("--out", metavar="PATH.json")
    args = parser.parse_args(argv)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.videos is None:
            write_set(folder)
        index_set(folder, args.videos or folder)
        runs = [measure(folder, frames=n, workers=args.workers, batches=args.batches) for n in FRAMES]
        training = [
            measure_training(folder, frames=n, workers=args.workers, steps=args.batches) for n in FRAMES
        ]
    made = {
        "files": VIDEOS, "seconds": SECONDS, "fps": RATE, "height": HEIGHT, "width": WIDTH, "codec": "h264",
        "gop": GOP,
    }  # fmt: skip
    result = {
        "cpus": os.cpu_count(), "load_before": load, "image_size": IMAGE_SIZE, "batch": BATCH,
        "videos": made if args.videos is None else args.videos.name, "runs": runs, "training_tiny": training,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
