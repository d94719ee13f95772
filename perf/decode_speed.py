"""Speed of our video reader, decord and OpenCV on the same files, with one thread each, in one run.

Needs decord and OpenCV: pip install -e '.[benchmark]'

Every reader gives the same frames as 384 x 384 pixels. The others do so in two ways:

- "pil": full-size frames resized by PIL, as in LLaVA's pipeline: the pixels that SigLIP was trained on.
- "own": the reader's own resizing, whose pixels differ.

Readers take turns. Medians of their CPU time over all threads are compared: that is what a worker pays, and
other work on the cores changes it less than the wall-clock time.
"""

import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.decoding import GopDecoder, take_exactly
from crosslmm_jax.data.media.locate import Deadline
from crosslmm_jax.data.media.packet_index import open_indexed
from crosslmm_jax.data.media.video import read_frames
from crosslmm_jax.errors import DataError, UserError
from crosslmm_jax.profiling import Row
from crosslmm_jax.profiling.report import table
from perf.command import command_line, need, parser_of
from perf.decode_speed_files import LONG_FRAMES, SHORT_FRAMES, write_files, write_mixed

SIZE = 384
SPARSE, DENSE = 8, {"short": 64, "long": 256}

Reader = Callable[[str, np.ndarray, int], np.ndarray]  # (path, frame numbers, frames per GOP) -> pixels


def readers() -> dict[str, Reader]:
    """The readers by name.

    Raises:
        UserError: decord or OpenCV is not installed.
    """
    need("cv2", "decord")
    import cv2  # type: ignore[import-not-found]
    import decord  # type: ignore[import-not-found]
    from PIL import Image

    cv2.setNumThreads(1)

    def by_pil(frames: Iterable[np.ndarray]) -> np.ndarray:
        images = [Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for frame in frames]
        return np.stack([np.asarray(image) for image in images])

    def ours(path: str, numbers: np.ndarray, gop: int) -> np.ndarray:
        return read_frames(path, SamplingConfig(frames=len(numbers)), size=SIZE, num_threads=1).frames

    def decord_pil(path: str, numbers: np.ndarray, gop: int) -> np.ndarray:
        return by_pil(decord.VideoReader(path, num_threads=1).get_batch(numbers).asnumpy())

    def decord_own(path: str, numbers: np.ndarray, gop: int) -> np.ndarray:
        reader = decord.VideoReader(path, num_threads=1, width=SIZE, height=SIZE)
        return reader.get_batch(numbers).asnumpy()

    def opencv_pil(path: str, numbers: np.ndarray, gop: int) -> np.ndarray:
        return by_pil(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in _opencv_frames(path, numbers, gop))

    def opencv_own(path: str, numbers: np.ndarray, gop: int) -> np.ndarray:
        frames = _opencv_frames(path, numbers, gop)
        small = (cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for frame in frames)
        return np.stack([cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in small])

    return {
        "crosslmm_jax": ours, "decord pil": decord_pil, "opencv pil": opencv_pil, "decord own": decord_own,
        "opencv own": opencv_own,
    }  # fmt: skip


def _opencv_frames(path: str, numbers: np.ndarray, gop: int) -> Iterator[np.ndarray]:
    """Frames by OpenCV, which seeks if the next wanted frame is more than one GOP ahead."""
    import cv2  # type: ignore[import-not-found]

    video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    position = 0
    for number in numbers.tolist():
        if number - position > gop:
            video.set(cv2.CAP_PROP_POS_FRAMES, number)
            position = number
        while position < number:
            video.grab()
            position += 1
        good, frame = video.read()
        if not good:
            raise UserError(f"{path}: OpenCV gives no frame {number}")
        position += 1
        yield frame
    video.release()


def compare(path: Path, kind: str, gop: int, frames: int, *, rounds: int, budget_s: float) -> Row:
    """Seconds of every reader for `frames` frames, medians of `rounds` turns; whether pixels are equal."""
    total = LONG_FRAMES if kind == "long" else SHORT_FRAMES[gop]
    numbers = np.arange(frames) * (total - 1) // (frames - 1)
    named = readers()
    clocks = {"cpu_seconds": time.process_time, "wall_seconds": time.perf_counter}
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in named} for clock in clocks}
    expected, equal = None, {}
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn and time.perf_counter() - begin > budget_s:
            break
        for name, reader in named.items():
            start = {clock: read() for clock, read in clocks.items()}
            pixels = reader(str(path), numbers, gop)
            for clock, read in clocks.items():
                times[clock][name].append(read() - start[clock])
            expected = pixels if expected is None else expected
            equal[name] = bool(np.array_equal(pixels, expected))
    rounds = len(times["cpu_seconds"]["crosslmm_jax"])
    medians = {
        clock: {name: round(statistics.median(values), 4) for name, values in of_clock.items()}
        for clock, of_clock in times.items()
    }
    cpu = medians["cpu_seconds"]
    ratios = {
        f"ratio_to_best_{way}": round(
            min(cpu[f"decord {way}"], cpu[f"opencv {way}"]) / cpu["crosslmm_jax"], 2
        )
        for way in ("pil", "own")
    }
    alone = statistics.median(decode_alone(path, frames) for _ in range(rounds))
    return {
        "file": kind, "gop": gop, "frames": frames, "rounds": rounds, **ratios, **medians,
        "decode_alone_cpu_seconds": round(alone, 4),
        "pixels_equal_ours": equal,
    }  # fmt: skip


def decode_alone(path: Path, frames: int) -> float:
    """CPU seconds of ffmpeg for the packets that the frames need: no reader can take less."""
    deadline = Deadline(path, None)
    with open_indexed(path, deadline) as (stream, index):
        order = np.argsort(index.times)
        wanted = order[np.arange(frames) * (len(order) - 1) // (frames - 1)]
        start = time.process_time()
        decoder = GopDecoder(stream, index, shortcuts=True, wanted=set(wanted.tolist()), deadline=deadline)
        take_exactly(decoder, index, wanted, lambda frame, first, end: None)
        return time.process_time() - start


def memory_growth(paths: list[Path], *, reads: int, seed: int = 0) -> Row:
    """Resident memory of this process while it reads videos, good and damaged, in random order.

    Returns:
        Numbers of reads and of failures; the most MiB in the first fifth of the reads and in the rest, and
        the difference.
    """
    rng, failures, sizes = random.Random(seed), 0, []
    for _ in range(reads):
        sampling = SamplingConfig(frames=rng.choice([1, 8, 32]))
        try:
            read_frames(rng.choice(paths), sampling, size=SIZE, deadline_s=10)
        except DataError:
            failures += 1
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    after, most = max(sizes[: reads // 5]), max(sizes[reads // 5 :])
    return {
        "files": len(paths), "reads": reads, "failures": failures, "mib_in_first_fifth": round(after, 1),
        "mib_in_rest": round(most, 1), "growth_mib": round(most - after, 1),
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Measures, and writes JSON and markdown."""
    parser = parser_of("decode_speed", __doc__)
    parser.add_argument("--folder", help="where videos are made and kept; default: a temporary folder")
    parser.add_argument("--kinds", nargs="+", choices=("short", "long"), default=["short", "long"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=40, help="seconds after which a cell gets no new round"
    )
    parser.add_argument("--out", metavar="PATH.json", help="the markdown is written beside it")
    args = parser.parse_args(argv)
    readers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(args.folder or name)
        folder.mkdir(parents=True, exist_ok=True)
        memory = memory_growth(write_mixed(Path(name) / "mixed"), reads=1000)
        print(json.dumps(memory), flush=True)
        cells = []
        for (kind, gop), path in write_files(folder).items():
            for frames in (SPARSE, DENSE[kind]) if kind in args.kinds else ():
                cells.append(compare(path, kind, gop, frames, rounds=args.rounds, budget_s=args.budget))
                print(json.dumps(cells[-1]), flush=True)
    result = {
        "command": command_line(),
        "versions": _versions(),
        "cpus": os.cpu_count(),
        "threads": 1,
        "image_size": SIZE,
        "cells": cells,
        "memory": memory,
    }
    if args.out:
        out = Path(args.out)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(as_markdown(result), encoding="utf-8")


def as_markdown(result: Row) -> str:
    """The command, the versions, a table of CPU milliseconds, and the memory."""
    names = list(result["cells"][0]["cpu_seconds"]) if result["cells"] else []
    head = [
        "file",
        "GOP",
        "frames",
        *names,
        "best other / ours, pil",
        "own",
        "ffmpeg alone",
        "best other / that",
    ]
    rows = []
    for cell in result["cells"]:
        cpu = cell["cpu_seconds"]
        best = min(cpu["decord pil"], cpu["opencv pil"])
        alone = cell["decode_alone_cpu_seconds"]
        rows.append([
            cell["file"], str(cell["gop"]), str(cell["frames"]),
            *(f"{1e3 * cpu[name]:.0f}" for name in names),
            f"{cell['ratio_to_best_pil']:.2f}", f"{cell['ratio_to_best_own']:.2f}", f"{1e3 * alone:.0f}",
            f"{best / alone:.2f}",
        ])  # fmt: skip
    memory = result["memory"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([
        "# Speed of the video reader\n",
        f"    {result['command']}\n",
        f"{versions}; {result['cpus']} CPU cores; one thread for every reader.\n",
        *table(head, rows),
        f"\nMemory: {memory['reads']} reads of {memory['files']} files in random order, "
        f"{memory['failures']} of them of damaged files: "
        f"at most {memory['mib_in_first_fifth']} MiB in the first fifth, "
        f"{memory['mib_in_rest']} MiB in the rest.\n",
    ])  # fmt: skip


def _versions() -> dict[str, str]:
    import av
    import cv2  # type: ignore[import-not-found]
    import decord  # type: ignore[import-not-found]
    import PIL

    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    return {
        "python": platform.python_version(), "av": av.__version__, "libavcodec of av": ffmpeg,
        "decord": decord.__version__, "opencv": cv2.__version__, "pillow": PIL.__version__,
        "numpy": np.__version__,
    }  # fmt: skip
