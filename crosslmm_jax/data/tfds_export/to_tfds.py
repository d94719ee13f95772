"""Writes a mixture as a data set of TensorFlow Datasets: rows and their media in ArrayRecord files.

    OUT/<name>-train.array_record-00000-of-00010 ...   one record per row, with the bytes of its media
    OUT/features.json, OUT/dataset_info.json           for `tfds.builder_from_directory(OUT)`
    OUT/mixture.yaml                                   the data sets with their weights, as a mixture
    OUT/bad.jsonl                                      rows that cannot be used, as in an index

A folder of images stays one video: the record has all images and their number. Workers write several files
at a time, each row by row, to a hidden folder beside OUT that is published at the end. The next run keeps
the files that a stopped run finished there.
"""

import collections
import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from crosslmm_jax.data.annotations import DatasetSpec, Row, read_mixture, read_rows
from crosslmm_jax.data.index import BAD
from crosslmm_jax.data.tfds_export.shard_writer import (
    Shard,
    ShardResult,
    row_size,
    tfds_features,
    write_shard,
)
from crosslmm_jax.errors import Fault, UserError, list_counts
from crosslmm_jax.utils import Progress, atomic_folder, is_vacant, map_in_order

SPLIT = "train"
_MANIFEST = "to_tfds.json"  # what OUT was made from
_MOST_ROWS = 2**16  # rows of a shard where `shards` is not given: their text is held in memory


@dataclasses.dataclass(frozen=True)
class TfdsReport:
    """What was written."""

    rows: int
    shards: int
    size_bytes: int
    bad: dict[str, int]  # reason -> rows

    def lines(self) -> list[str]:
        """The report as lines of text."""
        head = f"{self.rows} rows in {self.shards} shards, {self.size_bytes / 1e6:.1f} MB"
        return [f"{head}, {sum(self.bad.values())} bad"] + [f"  {count}" for count in list_counts(self.bad)]


def to_tfds(
    mixture: str,
    out: str | os.PathLike[str],
    *,
    media_root: str | None = None,
    path_map: str | None = None,
    shards: int | None = None,
    shard_mb: float = 512,
    workers: int = 0,
    seed: int = 0,
    allow_outside: bool = False,
    quiet: bool = False,
) -> TfdsReport:
    """Writes the rows that a mixture selects, in order.

    Args:
        mixture: a YAML file, or one file of annotations.
        out: folder to write; unchanged if it was written from the same rows and files.
        media_root: folder of the media where the mixture names none.
        path_map: YAML file that maps beginnings of the mixture's paths to local folders.
        shards: number of files, fewer where rows are few or large; None: by `shard_mb`.
        shard_mb: approximate megabytes per file.
        workers: worker processes; 0: this process does everything.
        seed: seed of the random strategies of the mixture.
        allow_outside: media paths may leave their root.
        quiet: show no progress on stderr.

    Raises:
        UserError: a file of the mixture cannot be read, `out` has other content or cannot be written, the
            disk is full, no row is good, or a worker process died.
    """
    if not 0 < shard_mb < float("inf") or (shards is not None and shards < 1):
        raise UserError("--shards and --shard-mb must be above 0")
    specs = read_mixture(mixture, media_root=media_root, path_map=path_map)
    target = Path(os.path.realpath(out))  # a symbolic link stays one

    def items() -> Iterator[Row | Fault]:
        return (item for spec in specs for item in read_rows(spec, seed=seed, allow_outside=allow_outside))

    if shards is None:
        limits = (int(shard_mb * 1e6), _MOST_ROWS)
    else:
        total = sum(row_size(item, allow_outside=allow_outside) for item in items() if isinstance(item, Row))
        limits = (max(1, -(-total // shards)), None)
    planned = _plan(items(), *limits, allow_outside=allow_outside)
    if not is_vacant(target):
        return _present(target, out, planned)
    return _pack(target, planned, specs, workers=workers, quiet=quiet)


def _pack(
    target: Path, planned: Iterator[Shard], specs: list[DatasetSpec], *, workers: int, quiet: bool
) -> TfdsReport:
    """Writes the data set and publishes it at `target`."""
    with atomic_folder(target, resume=True) as work:
        progress = Progress("to-tfds", unit="rows", quiet=quiet)
        results: list[ShardResult] = []
        bad: collections.Counter[str] = collections.Counter()
        done, size = 0, 0
        try:
            with open(work / BAD, "w", encoding="utf-8") as report:
                for result in _write(planned, work, workers):
                    report.writelines(entry.line() for entry in result.bad)
                    bad.update(entry.reason for entry in result.bad)
                    results.append(dataclasses.replace(result, bad=()))
                    done, size = done + result.rows + len(result.bad), size + result.size_bytes
                    progress.update(done, f"{size / 1e6:.0f} MB, {bad.total()} bad")
            return _finish(work, target, results, bad, specs)
        finally:
            progress.close()


def _plan(
    items: Iterator[Row | Fault], most_bytes: int, most_rows: int | None, *, allow_outside: bool
) -> Iterator[Shard]:
    """Splits rows into shards of about `most_bytes`, by the sizes of their media."""
    number, size = 0, 0
    rows: list[Row | Fault] = []
    for item in items:
        rows.append(item)
        if isinstance(item, Row):
            size += row_size(item, allow_outside=allow_outside)
        if size >= most_bytes or len(rows) == most_rows:
            yield Shard(number, tuple(rows), allow_outside)
            number, size, rows = number + 1, 0, []
    if rows:
        yield Shard(number, tuple(rows), allow_outside)


def _present(target: Path, out: str | os.PathLike[str], planned: Iterator[Shard]) -> TfdsReport:
    """The report of an existing `target`. Raises UserError if made from other rows or files."""
    try:
        manifest = json.loads((target / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["shards"] == [shard.digest() for shard in planned]:
            return TfdsReport(**manifest["report"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--out {out}: exists and was not written by to-tfds; name another folder") from None
    raise UserError(f"--out {out}: holds another mixture, or files that changed since; name another folder")


def _write(planned: Iterator[Shard], work: Path, workers: int) -> Iterator[ShardResult]:
    """Writes the shards and yields their results in order; at most `workers` + 1 are in memory, as text."""
    for stale in work.glob("*-of-*"):  # of a run that was killed while it renamed its files
        stale.unlink()
    yield from map_in_order(
        functools.partial(write_shard, folder=str(work)), planned, workers=workers,
        if_one_dies="run the same command again with fewer --workers: finished files are kept",
    )  # fmt: skip


def _finish(
    work: Path, target: Path, results: list[ShardResult], bad: Mapping[str, int], specs: list[DatasetSpec]
) -> TfdsReport:
    """Writes the files that describe the shards, and gives the shards their final names."""
    good = [result for result in results if result.rows]
    if not good:
        raise UserError(f"{target}: no usable row; see {work / BAD}")
    name = re.sub(r"\W+", "_", target.name.lower(), flags=re.ASCII).strip("_") or "mixture"
    name = name if name[0].isalpha() else f"set_{name}"
    _describe(work, name, good, specs)
    _write_mixture(work / "mixture.yaml", good, specs)
    rows, size = (sum(getattr(result, name) for result in good) for name in ("rows", "size_bytes"))
    report = TfdsReport(rows, len(good), size, dict(bad))
    manifest = {"shards": [result.digest for result in results], "report": dataclasses.asdict(report)}
    (work / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for number, result in enumerate(good):
        last = f"{name}-{SPLIT}.array_record-{number:05d}-of-{len(good):05d}"
        os.replace(work / result.file, work / last)
    for leftover in work.glob("shard-*"):
        leftover.unlink()
    return report


def _describe(work: Path, name: str, results: list[ShardResult], specs: list[DatasetSpec]) -> None:
    """Writes features.json and dataset_info.json."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, file_adapters, naming, splits

    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(work), module_name=""
    )
    about = f"Written by `crosslmm data to-tfds`: {', '.join(spec.name for spec in specs)}."
    info = tfds.core.DatasetInfo(builder=identity, features=tfds_features(), description=about)
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    template = naming.ShardedFileTemplate(
        data_dir=work,  # type: ignore[arg-type]
        dataset_name=name,
        split=SPLIT,
        filetype_suffix="array_record",
    )
    split = splits.SplitInfo(
        name=SPLIT,
        shard_lengths=[result.rows for result in results],
        num_bytes=sum(result.size_bytes for result in results),
        filename_template=template,
    )
    info.set_splits(splits.SplitDict([split]))
    info.write_to_directory(work)


def _write_mixture(path: Path, results: list[ShardResult], specs: list[DatasetSpec]) -> None:
    """Writes the mixture: each data set is the slice of the records that came from it."""
    counts: collections.Counter[str] = collections.Counter()
    for result in results:
        counts.update(result.datasets)
    datasets, begin = [], 0
    for spec in specs:  # rows were written in this order
        if not (count := counts[spec.name]):
            continue
        split = f"{SPLIT}[{begin}:{begin + count}]"
        datasets.append({"path": ".", "name": spec.name, "weight": spec.weight, "options": {"split": split}})
        begin += count
    path.write_text(yaml.safe_dump({"datasets": datasets}, sort_keys=False), encoding="utf-8")
