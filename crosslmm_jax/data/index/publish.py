"""Describes the blocks of a finished pass, and merges the shards of an index that several machines made."""

import collections
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa

from crosslmm_jax.data.index.blocks import BlockKey, Shard, bad_path, link, read_meta
from crosslmm_jax.data.index.table import BAD, META, Record, map_table
from crosslmm_jax.errors import UserError, list_counts
from crosslmm_jax.utils import atomic_folder, check_local, is_vacant

_DIGESTED = ("row_hash", "duration", "num_frames")  # columns that batches depend on
_OWN = ("files", "bad", "digest", "shard")  # what shards of one index have each for itself


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """What a pass found."""

    rows: int  # good rows
    reused: int | None  # good rows that needed no new probe; None: not known
    bad: dict[str, int]  # reason -> rows

    def lines(self) -> list[str]:
        """The report as lines of text."""
        unchanged = "" if self.reused is None else f" ({self.reused} unchanged)"
        lines = [f"{self.rows} rows{unchanged}, {sum(self.bad.values())} bad"]
        return lines + [f"  {count}" for count in list_counts(self.bad)]


def publish(work: Path, meta: Record, *, reused: int | None, shard: Shard | None = None) -> IndexReport:
    """Writes bad.jsonl and `meta.json` for the blocks in `work`.

    Args:
        work: folder of the blocks.
        meta: what `meta.json` says besides.
        reused: good rows that needed no probe, for the report.
        shard: the part of an index that this is. Without one, `meta.json` is written only if a row is good.
    """
    files, bad = [], collections.Counter[str]()
    hashes = {name: hashlib.blake2b(digest_size=16) for name in ("media", *_DIGESTED)}
    with open(work / BAD, "w", encoding="utf-8") as lines:
        for path in sorted(work.glob("rows-*.arrow"), key=BlockKey.of_file):  # type: ignore[arg-type]
            table = map_table(path, _DIGESTED)
            files.append({"file": path.name, "rows": len(table)})
            _update(hashes, table)
            if bad_path(path).exists():
                for line in map_table(bad_path(path)).column("fault").to_pylist():
                    bad[json.loads(line)["reason"]] += 1
                    lines.write(line)
    rows = sum(entry["rows"] for entry in files)
    if rows or shard is not None:
        weights = [[one["name"], one["weight"]] for one in meta["datasets"]]
        inside = [meta["tokenizer"], weights, [one.hexdigest() for one in hashes.values()]]
        part = {} if shard is None else {"shard": list(shard)}
        digest = hashlib.blake2b(json.dumps(inside).encode(), digest_size=12).hexdigest()
        content = meta | part | {"digest": digest, "bad": dict(sorted(bad.items())), "files": files}
        (work / META).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return IndexReport(rows, reused, dict(sorted(bad.items())))


def _update(hashes: "dict[str, hashlib.blake2b]", table: pa.RecordBatch) -> None:
    """Adds a table to the hashes of its columns, which do not depend on where a table ends."""
    hashes["media"].update(table.column("num_frames").value_lengths().to_numpy())
    hashes["row_hash"].update(table.column("row_hash").to_numpy())
    for name in ("duration", "num_frames"):
        hashes[name].update(table.column(name).flatten().to_numpy())


def shard_folder(index: Path, shard: Shard) -> Path:
    """The folder of a shard, beside the index."""
    return index.with_name(f"{index.name}.shard-{shard.number}-of-{shard.count}")


def merge_index(index: str | os.PathLike[str]) -> IndexReport:
    """Merges the shards of an index, and deletes them.

    The index is the one that a single machine makes, byte for byte.

    Args:
        index: INDEX, whose shards lie beside it.

    Raises:
        UserError: there are no shards, one is missing, or they were made from different files.
    """
    check_local(index)
    target = Path(os.path.realpath(index))
    if not (target / META).exists() and not is_vacant(target):
        raise UserError(f"{index}: exists and is no index; name another folder")
    folders = _find_shards(target)
    metas = [read_meta(folder) for folder in folders]
    shared = [{name: value for name, value in meta.items() if name not in _OWN} for meta in metas]
    for folder, other in zip(folders, shared, strict=True):
        if other != shared[0]:
            raise UserError(
                f"{folder}: was made from other annotations, settings or files than {folders[0]}; make both"
                " again with the same `crosslmm data index` but for --shard"
            )
    with atomic_folder(target, resume=False) as work:
        for folder in folders:
            for path in [*folder.glob("rows-*.arrow"), *folder.glob("bad-*.arrow")]:
                link(path, work / path.name)
        report = publish(work, shared[0], reused=None)
        if not report.rows:
            why = ", ".join(list_counts(report.bad))
            raise UserError(f"{index}: no usable row ({why}); see {folders[0] / BAD} and those beside it")
    for folder in folders:
        shutil.rmtree(folder)
    return report


def _find_shards(target: Path) -> list[Path]:
    """The folders of all shards, in order."""
    pattern = re.compile(re.escape(target.name) + r"\.shard-(\d+)-of-(\d+)")
    found = [
        Shard(int(match[1]), int(match[2]))
        for path in (target.parent.iterdir() if target.parent.is_dir() else ())
        if (match := pattern.fullmatch(path.name)) and read_meta(path)
    ]
    again = f"crosslmm data index MIXTURE --out {shlex.quote(str(target))} --shard"
    if not found:
        raise UserError(f"{target}: there are no finished shards of it; make them with `{again} K/N`")
    counts = sorted({shard.count for shard in found})
    if len(counts) > 1:
        listed = " and ".join(map(str, counts))
        raise UserError(f"{target}: has shards of {listed}; delete those of one number")
    if missing := sorted(set(range(counts[0])) - {shard.number for shard in found}):
        named = [f"{number}/{counts[0]}" for number in missing]
        listed = ", ".join(named[:10]) + (f" and {len(named) - 10} more" if len(named) > 10 else "")
        raise UserError(
            f"{target}: missing or not finished: shard {listed}; make each as `{again} {named[0]}`"
        )
    return [shard_folder(target, Shard(number, counts[0])) for number in range(counts[0])]
