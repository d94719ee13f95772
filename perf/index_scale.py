"""An index from 10^4 to 2 * 10^7 rows: seconds, memory and cost per row of making and of reading it.

Rows are a JSON list of short questions and answers, four for each video, all different. The videos are 10,000
names of small clips. They are probed once, and indexing takes the answers from a table; all else is real:
reading, checking, tokens, stamps of media, tables, merging and reads.

Each stage runs in one process of its own, each shard too. Its peak memory is that of all pages that it
touched, those of mapped tables and of libraries included.
"""

import json
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from crosslmm_jax.config import DataConfig, SamplingConfig
from crosslmm_jax.data.annotations import Row, read_mixture, read_rows
from crosslmm_jax.data.index import RowStore, Shard, build_index, merge_index, open_index
from crosslmm_jax.data.index import probe as probing
from crosslmm_jax.data.index.table import META, ProbeOptions
from crosslmm_jax.data.loading import Dataset
from crosslmm_jax.demo import write_default_tokenizer
from crosslmm_jax.errors import UserError
from perf.clips import write_clip
from perf.command import command_line, parser_of

SIZES = (10_000, 100_000, 1_000_000)
VIDEOS, CLIPS = 10_000, 16
ROWS_PER_VIDEO = 4
SHARDS = 3
READS, BATCHES = 20_000, 100
Measured = dict[str, Any]
_WORDS = (
    "a the man woman child dog car street kitchen ball red blue small large slowly quickly walks runs holds"
    " opens closes turns sits stands jumps before after while behind beside table door window camera hand"
).split()


def write_videos(folder: Path) -> None:
    """VIDEOS names of CLIPS small files."""
    folder.mkdir(parents=True)
    for number in range(CLIPS):
        write_clip(folder / f"clip{number}.mp4", seconds=1, seed=number)
    for number in range(VIDEOS):
        os.link(folder / f"clip{number % CLIPS}.mp4", folder / f"{number:05d}.mp4")


def write_rows(path: Path, rows: int) -> None:
    """A JSON list of `rows` rows."""
    draw = random.Random(0)
    parts = [" ".join(draw.choices(_WORDS, k=draw.randint(3, 12))) for _ in range(4096)]
    turns = '[{"from":"human","value":"<image>\\n%s %s?"},{"from":"gpt","value":"%s, %s."}]'
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            video = row // ROWS_PER_VIDEO % VIDEOS
            said = turns % tuple(parts[draw.getrandbits(12)] for _ in range(4))
            mark = "[\n" if row == 0 else ",\n"
            file.write(f'{mark}{{"id":{row},"video":"{video:05d}.mp4","conversations":{said}}}')
        file.write("\n]\n")


def _measured(stage: Callable[..., Measured], *words: object) -> Measured:
    begin, cpu = time.perf_counter(), time.process_time()
    found = stage(*words)
    return {
        "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **found,
    }  # fmt: skip


def measure(stage: Callable[..., Measured], *words: object) -> Measured:
    """What a stage returns, with its seconds and peak memory, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_measured, stage, *words).result()


def measure_index(folder: Path, name: str, at_once: int) -> Measured:
    """Makes an index; with `at_once` above 1 as that many shards at the same time, which are then merged.

    Returns:
        seconds of all; CPU seconds of all processes; the peak memory of the one with the largest.
    """
    if at_once == 1:
        return measure(index, folder, name, None)
    begin = time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        calls = [threads.submit(measure, index, folder, name, (one, at_once)) for one in range(at_once)]
        parts = [call.result() for call in calls]
    parts.append(measure(merge, folder, name))
    return {
        "seconds": time.perf_counter() - begin, "at_once": at_once,
        "cpu_seconds": sum(part["cpu_seconds"] for part in parts),
        "peak_mb": max(part["peak_mb"] for part in parts), "rows": parts[-1]["rows"],
        "unchanged": 0, "bad": sum(part["bad"] for part in parts[:-1]),
    }  # fmt: skip


def nothing() -> Measured:
    """A process that imports the same modules."""
    return {}


def probe(folder: Path) -> Measured:
    """Probes every video once, and writes the table of the answers."""
    (spec,) = read_mixture(str(folder / "rows.json"), media_root=str(folder / "videos"))
    rows = {row.media[0]: row for row in read_rows(spec, seed=0) if isinstance(row, Row)}
    begin = time.process_time()
    table = {name: probing._probe(row, name, options=ProbeOptions()) for name, row in rows.items()}
    probe_ms = 1e3 * (time.process_time() - begin) / len(rows)
    (folder / "probes.json").write_text(json.dumps(table))
    return {"files": len(rows), "probe_ms": probe_ms}


def index(folder: Path, name: str, shard: tuple[int, int] | None) -> Measured:
    """`crosslmm data index`."""
    table = json.loads((folder / "probes.json").read_text())

    def answer(row: Row, reference: str, *, options: ProbeOptions) -> Measured:
        return table[reference] | {"stamp": probing.media_stamp(row.root, reference)}

    probing._probe = answer
    report = build_index(
        str(folder / "rows.json"), folder / name, tokenizer=str(folder / "tokenizer"),
        media_root=str(folder / "videos"), shard=Shard(*shard) if shard else None,
    )  # fmt: skip
    return {"rows": report.rows, "unchanged": report.reused, "bad": sum(report.bad.values())}


def merge(folder: Path, name: str) -> Measured:
    """`crosslmm data merge`."""
    return {"rows": merge_index(folder / name).rows}


def start(folder: Path) -> Measured:
    """What each process of a run does before its first batch."""
    dataset = _dataset(folder)
    return {"rows": len(dataset.rows), "shapes": len(dataset.buckets)}


def _dataset(folder: Path) -> Dataset:
    config = DataConfig(
        index=str(folder / "index"), tokenizer=str(folder / "tokenizer"), batch_size=128,
        sampling=SamplingConfig(frames=8),
    )  # fmt: skip
    return Dataset(config, tokens_per_frame=9, image_size=32)


def read(folder: Path) -> Measured:
    """Shuffled rows one by one."""
    store = RowStore(open_index(folder / "index"))
    for number in range(0, len(store), 2**13):
        store[number]  # maps every table, as a run does in its first steps
    numbers = np.random.default_rng(0).integers(len(store), size=READS).tolist()
    begin, cpu = time.perf_counter(), time.process_time()
    for number in numbers:
        store[number]
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {"row_us": 1e6 * cpu / READS, "row_wall_us": 1e6 * seconds / READS}


def batches(folder: Path) -> Measured:
    """Shuffled batches of 128 rows: which rows, and reading them. Media are not decoded."""
    dataset = _dataset(folder)
    for number in range(0, len(dataset.rows), 2**13):
        dataset.rows[number]
    cpu = time.process_time()
    for step in range(BATCHES):
        for number in dataset.scheduled(step).rows.tolist():
            dataset.rows[number]
    return {"batch_ms": 1e3 * (time.process_time() - cpu) / BATCHES}


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    names = [sorted(path.name for path in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names[0]
    )


def measure_size(folder: Path, rows: int, *, shards: bool, at_once: int) -> Measured:
    """All stages for one number of rows."""
    write_rows(folder / "rows.json", rows)
    shutil.rmtree(folder / "index", ignore_errors=True)
    result: Measured = {"rows": rows, "json_mb": (folder / "rows.json").stat().st_size / 1e6}
    result["index"] = measure_index(folder, "index", at_once)
    result["again"] = measure(index, folder, "index", None)
    result["index_mb"] = sum(path.stat().st_size for path in (folder / "index").iterdir()) / 1e6
    result |= measure_reads(folder)
    if shards:
        made = [measure(index, folder, "merged", (number, SHARDS)) for number in range(SHARDS)]
        result["shards"], result["merge"] = made, measure(merge, folder, "merged")
        result["merged_is_equal"] = same_files(folder / "index", folder / "merged")
        shutil.rmtree(folder / "merged")
    return result


def measure_reads(folder: Path) -> Measured:
    """What a run does with an index."""
    return {stage.__name__: measure(stage, folder) for stage in (start, read, batches)}


def measure_copies(folder: Path, copies: int) -> Measured:
    """The reads of an index whose tables have `copies` names each, and so of as many times the rows."""
    meta = json.loads((folder / "index" / META).read_text())
    files = []
    for copy in range(copies):
        for entry in meta["files"]:
            files.append(entry | {"file": f"copy{copy}-{entry['file']}"})
            os.link(folder / "index" / entry["file"], folder / "index" / files[-1]["file"])
    (folder / "index" / META).write_text(json.dumps(meta | {"files": files}))
    return {"rows": sum(entry["rows"] for entry in files), "copies": copies} | measure_reads(folder)


def _made(cell: Callable[[Measured], str], stage: str = "index") -> Callable[[Measured], str]:
    """The cell of a stage that not every size has."""
    return lambda one: cell(one) if stage in one else "not run"


COLUMNS: dict[str, Callable[[Measured], str]] = {
    "rows": lambda one: f"{one['rows']:,}" + (f" ({one['copies']} copies)" if "copies" in one else ""),
    "index, s": _made(
        lambda one: (
            f"{one['index']['seconds']:.1f}"
            + (f" ({one['index']['at_once']} shards at once)" if "at_once" in one["index"] else "")
        )
    ),
    "CPU us per row": _made(lambda one: f"{1e6 * one['index']['cpu_seconds'] / one['rows']:.0f}"),
    "peak MB": _made(lambda one: f"{one['index']['peak_mb']:.0f}"),
    "again, s": _made(lambda one: f"{one['again']['seconds']:.1f}"),
    "CPU s per 10^6 rows": _made(lambda one: f"{1e6 * one['again']['cpu_seconds'] / one['rows']:.1f}"),
    "index, MB": _made(lambda one: f"{one['index_mb']:.0f}"),
    f"{SHARDS} shards, s": _made(
        lambda one: ", ".join(f"{part['seconds']:.0f}" for part in one["shards"]), "shards"
    ),
    "merge, s": _made(lambda one: f"{one['merge']['seconds']:.1f}", "shards"),
    "merged equal": _made(lambda one: "yes" if one["merged_is_equal"] else "NO", "shards"),
    "start, s": lambda one: f"{one['start']['seconds']:.2f}",
    "start, peak MB": lambda one: f"{one['start']['peak_mb']:.0f}",
    "row, CPU us": lambda one: f"{one['read']['row_us']:.0f}",
    "batch of 128, CPU ms": lambda one: f"{one['batches']['batch_ms']:.1f}",
}


def page(result: Measured) -> str:
    """The table, with what was measured and where."""
    about = str(__doc__).strip().partition("\n\n")[2]
    rows = [[cell(run) for cell in COLUMNS.values()] for run in result["sizes"]]
    table = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    process, probed = result["process"], result["probe"]
    note = (
        f"{result['cpus']} CPU cores (load {result['load_before']:.1f} before the run):"
        f" CPU seconds say more than seconds. A process that only imports the same modules has"
        f" {process['peak_mb']:.0f} MB. A probe takes {probed['probe_ms']:.1f} ms of CPU, mean of"
        f' {probed["files"]:,} files. "Again": nothing changed.'
    )
    head = ["# An index over the number of rows", "", f"    {result['command']}", "", about, ""]
    return "\n".join([*head, *table, "", note]) + "\n"


def main(argv: Sequence[str]) -> None:
    """Measures each size and writes JSON and a table after each."""
    parser = parser_of("index_scale", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), metavar="ROWS")
    parser.add_argument("--shards-up-to", type=int, default=100_000, metavar="ROWS")
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N", help="make the last index as N shards at the same time"
    )
    parser.add_argument("--copies", type=int, metavar="N", help="reads of the last index under N names, too")
    parser.add_argument("--folder", type=Path, help="on a disk with 2 KB per row; default: a temporary one")
    parser.add_argument("--out", metavar="PATH.json", help="the table goes to PATH.md")
    args = parser.parse_args(argv)
    if min(args.at_once, *args.sizes) < 1:
        raise UserError("--sizes and --at-once must be above 0")
    result: Measured = {
        "command": command_line(), "cpus": os.cpu_count(), "load_before": os.getloadavg()[0], "sizes": [],
    }  # fmt: skip

    def add(found: Measured) -> None:
        result["sizes"].append(found)
        if args.out:
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            Path(args.out).with_suffix(".md").write_text(page(result), encoding="utf-8")

    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_videos(folder / "videos")
        write_default_tokenizer(folder / "tokenizer")
        write_rows(folder / "rows.json", VIDEOS * ROWS_PER_VIDEO)
        result["process"], result["probe"] = measure(nothing), measure(probe, folder)
        for rows in args.sizes:
            at_once = args.at_once if rows == args.sizes[-1] else 1
            add(measure_size(folder, rows, shards=rows <= args.shards_up_to, at_once=at_once))
        if args.copies:
            add(measure_copies(folder, args.copies))
    print(page(result))
