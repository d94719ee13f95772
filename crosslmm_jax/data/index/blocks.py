"""Blocks: the unit in which an index is made, reused, and divided among machines.

Block b of a data set holds the rows of BLOCK entries of its annotations, from entry b * BLOCK. So what a
block holds follows from the annotations alone, and not from the machine that makes it, or when. Its files:

    rows-00003-00012.arrow   its good rows, for block 12 of data set 3; there is one even if no row is good
    bad-00003-00012.arrow    its other rows, with the fault of each; absent if there are none

The metadata of a table says what it was made from, and so where it may be used again.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from crosslmm_jax.data.annotations import DatasetSpec, annotation_files
from crosslmm_jax.data.index.table import (
    COUNTED,
    META,
    PROBED,
    SCHEMA,
    VERSION,
    ProbeOptions,
    Record,
    map_table,
    write_table,
)
from crosslmm_jax.errors import UserError

BLOCK = 2**14  # entries of annotations
BAD_SCHEMA = pa.schema([*SCHEMA, ("fault", pa.string())])  # `Fault.line`; the rest is null in an unread row
_NAME = re.compile(r"rows-(\d+)-(\d+)\.arrow")
_SHARD = re.compile(r"(\d+)/(\d+)")


class BlockKey(NamedTuple):
    """Number of a data set in its mixture, and of a block in the data set."""

    dataset: int
    block: int

    def rows_name(self) -> str:
        """File of its good rows."""
        return f"rows-{self.dataset:05d}-{self.block:05d}.arrow"

    @classmethod
    def of_file(cls, path: Path) -> "BlockKey | None":
        """The key of a file that `rows_name` named, None for others."""
        match = _NAME.fullmatch(path.name)
        return cls(int(match[1]), int(match[2])) if match else None


class Shard(NamedTuple):
    """Part `number` of `count` of an index; every block belongs to one part."""

    number: int = 0
    count: int = 1

    def has(self, key: BlockKey) -> bool:
        """Whether a block belongs to this part."""
        return (key.dataset + key.block) % self.count == self.number


def parse_shard(text: str) -> Shard:
    """Parses "K/N". Raises UserError unless K is from 0 to N - 1."""
    match = _SHARD.fullmatch(text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard is {text!r}; write K/N with K from 0 to N - 1, e.g. 0/16 to 15/16")
    return Shard(int(match[1]), int(match[2]))


def bad_path(rows: Path) -> Path:
    """The file of the bad rows of a block, beside that of its good rows."""
    return rows.with_name(rows.name.replace("rows-", "bad-", 1))


@dataclasses.dataclass(frozen=True)
class Origins:
    """What an index is made from. Blocks with equal origins are equal, but for changed media.

    Attributes:
        names: name of each data set.
        weights: weight of each data set.
        sources: hash of each data set's settings and of the stamps of its annotation files.
        tokenizer: fingerprint of the tokenizer.
        wording: time instruction -> tokens of its words.
        outside: "allowed" where media may leave their root, else "refused".
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    sources: tuple[str, ...]
    tokenizer: str
    wording: Mapping[str, int]
    outside: str

    def metadata(self, key: BlockKey) -> dict[str, str]:
        """The metadata of a block's tables."""
        return {
            "dataset": self.names[key.dataset], "block": str(key.block), "source": self.sources[key.dataset],
            "tokenizer": self.tokenizer, "outside": self.outside,
        }  # fmt: skip

    def to_json(self) -> Record:
        """The part of `meta.json` that is the same for all shards of an index."""
        rows = zip(self.names, self.weights, self.sources, strict=True)
        return {
            "version": VERSION, "tokenizer": self.tokenizer, "wording": dict(self.wording),
            "outside": self.outside,
            "datasets": [{"name": name, "weight": weight, "source": source} for name, weight, source in rows],
        }  # fmt: skip


def origins_of(
    specs: Sequence[DatasetSpec], *, tokenizer: str, wording: Mapping[str, int], seed: int,
    options: ProbeOptions,
) -> Origins:  # fmt: skip
    """What an index of `specs` is made from now; `tokenizer` is a fingerprint."""
    return Origins(
        names=tuple(spec.name for spec in specs),
        weights=tuple(spec.weight for spec in specs),
        sources=tuple(_source(spec, seed=seed, options=options) for spec in specs),
        tokenizer=tokenizer,
        wording=wording,
        outside="allowed" if options.allow_outside else "refused",
    )


def _source(spec: DatasetSpec, *, seed: int, options: ProbeOptions) -> str:
    files = []
    for path in annotation_files(spec):
        try:
            found = os.stat(path)
            files.append([path, found.st_size, found.st_mtime_ns])
        except OSError:
            files.append([path])  # its reader says what is wrong
    content = [
        VERSION, BLOCK, dataclasses.asdict(spec), os.path.abspath(spec.root), seed, options, files,
    ]  # fmt: skip
    return hashlib.blake2b(json.dumps(content, default=str).encode(), digest_size=12).hexdigest()


def write_block(
    path: Path, good: Sequence[pa.RecordBatch], bad: Sequence[pa.RecordBatch], metadata: dict[str, str]
) -> None:
    """Writes the tables of a block, its good rows to `path`; that table is there once both are complete."""
    if any(len(part) for part in bad):
        write_table(bad_path(path), pa.Table.from_batches(bad, BAD_SCHEMA).replace_schema_metadata(metadata))
    write_table(path, pa.Table.from_batches(good, SCHEMA).replace_schema_metadata(metadata))


class EarlierBlock(NamedTuple):
    """A block, or a part of one, that an earlier pass wrote.

    Attributes:
        rows: file of its good rows.
        metadata: what it was made from.
        leftover: it is of a pass that was stopped, and not of an index.
    """

    rows: Path
    metadata: Mapping[str, str]
    leftover: bool


def earlier_blocks(files: Iterable[Path], *, leftover: bool) -> Iterator[EarlierBlock]:
    """The blocks of these files, without those that are damaged or of another version."""
    for path in files:
        try:
            table = map_table(path, ["row_hash", *PROBED, *COUNTED])
        except (OSError, KeyError, pa.ArrowException):
            continue
        metadata = {name.decode(): text.decode() for name, text in (table.schema.metadata or {}).items()}
        if "block" in metadata:
            yield EarlierBlock(path, metadata, leftover)


def keep_leftovers(work: Path) -> list[Path]:
    """Moves tables of stopped passes to names that a new pass does not use; returns them, latest first."""
    folder = work / "earlier"
    folder.mkdir(exist_ok=True)
    number = max((int(path.stem.partition("-")[2]) for path in folder.glob("rows-*.arrow")), default=-1)
    for path in sorted(work.glob("rows-*.arrow")):
        number += 1
        if bad_path(path).exists():
            os.replace(bad_path(path), folder / f"bad-{number:06d}.arrow")
        os.replace(path, folder / f"rows-{number:06d}.arrow")
    for path in [*work.glob("bad-*.arrow"), *work.glob("*.incomplete")]:  # of blocks that were not finished
        path.unlink()
    return sorted(folder.glob("rows-*.arrow"), reverse=True)


def take_block(block: EarlierBlock, target: Path) -> None:
    """Gives an earlier block the name `target`, as a second name of its files where it is of an index."""
    place = _move if block.leftover else link
    if bad_path(block.rows).exists():
        place(bad_path(block.rows), bad_path(target))
    place(block.rows, target)


def _move(source: Path, target: Path) -> None:
    os.replace(source, target)


def link(source: Path, target: Path) -> None:
    """Makes `target` a second name of a file, or a copy where the disk knows no second names."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        incomplete = target.with_name(f"{target.name}.incomplete")
        shutil.copy2(source, incomplete)
        os.replace(incomplete, target)


def read_meta(folder: Path) -> Record:
    """`meta.json` of an index or of a shard of one; empty when there is none of this version."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) and meta.get("version") == VERSION else {}


def has_facts(table: pa.RecordBatch) -> np.ndarray:
    """bool[rows], whether a row of a table has what a probe found."""
    return table.column("stamp").is_valid().to_numpy(zero_copy_only=False)


def facts_of(table: pa.RecordBatch, row: int) -> Record:
    """What a pass found about a row of a table."""
    return {name: table.column(name)[row].as_py() for name in (*PROBED, *COUNTED)}
