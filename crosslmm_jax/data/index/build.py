"""Builds an index: one parallel pass over the rows of a mixture.

The pass writes to a hidden folder beside INDEX and publishes it at the end, so INDEX is complete or absent.
Rows that an earlier index has with the same text and unchanged files are copied from it, whether that index
was finished or not. So a pass that was killed resumes, and a pass over a changed mixture probes only what is
new.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from crosslmm_jax.data.annotations import DatasetSpec, Row, read_mixture, read_rows
from crosslmm_jax.data.index.probe import (
    COUNTED,
    PROBED,
    Chunk,
    Found,
    Known,
    Prober,
    fingerprint,
    row_hash,
)
from crosslmm_jax.data.index.table import BAD, META, SCHEMA, VERSION, Record, map_table, write_table
from crosslmm_jax.data.text import Tokenizer, wording_tokens
from crosslmm_jax.errors import Fault, UserError, list_counts
from crosslmm_jax.utils import Progress, atomic_folder, is_vacant, map_in_order

_CHUNK = 64  # rows per task of a worker
_TABLE_ROWS = 2**14  # rows per table
_DIGESTED = ("row_hash", "duration", "num_frames")  # columns that batches depend on
_TABLE_SECONDS = 30.0  # a table is closed after this time, so that a kill loses little


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """What a pass found."""

    rows: int  # good rows
    reused: int  # good rows that needed no new probe
    bad: dict[str, int]  # reason -> rows

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [f"{self.rows} rows ({self.reused} unchanged), {sum(self.bad.values())} bad"]
        return lines + [f"  {count}" for count in list_counts(self.bad)]


def build_index(
    mixture: str,
    out: str | os.PathLike[str],
    *,
    tokenizer: str,
    media_root: str | None = None,
    workers: int = 0,
    seed: int = 0,
    allow_outside: bool = False,
    quiet: bool = False,
) -> IndexReport:
    """Indexes a mixture.

    Args:
        mixture: a YAML file, or one file of annotations.
        out: INDEX folder; an existing index is updated.
        tokenizer: folder of the tokenizer that counts tokens.
        media_root: folder of the media where the mixture names none.
        workers: worker processes; 0: this process does everything.
        seed: seed of the random strategies of the mixture.
        allow_outside: media paths may leave their root.
        quiet: show no progress on stderr.

    Raises:
        UserError: a file of the mixture cannot be read, `out` is no index or cannot be written, no row is
            good, or a worker process died. `out` is then unchanged.
    """
    specs = read_mixture(mixture, media_root=media_root)
    prober = Prober(tokenizer, allow_outside=allow_outside)
    loaded = prober.tokenizer
    target = Path(os.path.realpath(out))  # a symbolic link stays one
    if not (target / META).exists() and not is_vacant(target):
        raise UserError(f"--out {out}: exists and is no index; name another folder")
    with atomic_folder(target, resume=True) as work:
        writer = _Writer(work, specs, loaded, allow_outside=allow_outside)
        tables = [path for kind in ("rows", "kept") for path in sorted(target.glob(f"{kind}-*.arrow"))]
        earlier = _EarlierRows((writer.leftovers, tables), writer.tokenizer, allow_outside=allow_outside)
        progress = Progress("index", unit="rows", quiet=quiet)
        items = (item for spec in specs for item in read_rows(spec, seed=seed, allow_outside=allow_outside))
        try:
            for found in map_in_order(
                prober, _chunks(items, earlier), workers=workers, spare=workers + 1,
                if_one_dies="run the same command again with fewer --workers: it resumes where it stopped",
            ):  # fmt: skip
                writer.add(found)
                progress.update(writer.seen, f"{sum(writer.bad.values())} bad")
        finally:
            progress.close()
            writer.flush()
        report = writer.finish()
        if not report.rows:
            why = f" ({', '.join(list_counts(report.bad))})" if report.bad else ""
            stays = ", so the old index stays" if (target / META).exists() else ""
            raise UserError(f"{out}: no usable row{why}{stays}; see {work / BAD}")
    return report


def _chunks(items: Iterator[Row | Fault], earlier: "_EarlierRows") -> Iterator[Chunk]:
    """Rows in chunks, with what earlier passes know about them."""
    while some := list(itertools.islice(items, _CHUNK)):
        rows = [item for item in some if isinstance(item, Row)]
        yield Chunk(rows, earlier.find(rows), [item for item in some if isinstance(item, Fault)])


class _EarlierRows:
    """Records of earlier tables by row hash: tables of stopped passes, and tables of the index.

    A row whose medium changed in between may have a record in both; the stamps tell which one holds.
    """

    def __init__(
        self, paths: tuple[Sequence[Path], Sequence[Path]], tokenizer: str, *, allow_outside: bool
    ) -> None:
        self._tables: list[pa.RecordBatch] = []
        self._same_tokenizer: list[bool] = []
        self._of_index = 0  # position in `_files` of the first table of the index
        hashes, places = [], []
        for place, path in enumerate([*paths[0], *paths[1]]):
            try:
                table = map_table(path, ["row_hash", *PROBED, *COUNTED])
            except (OSError, KeyError, pa.ArrowException):
                continue  # damaged, or of an earlier version: its rows are probed again
            found = table.column("row_hash").to_numpy()
            made_by = table.schema.metadata or {}
            if made_by.get(b"outside") == b"allowed" and not allow_outside:
                continue  # its media may be links out of the root
            number = len(self._tables)
            self._of_index += place < len(paths[0])
            self._tables.append(table)
            self._same_tokenizer.append(made_by.get(b"tokenizer", b"").decode() == tokenizer)
            hashes.append(found)
            places.append(np.stack([np.full(len(found), number), np.arange(len(found))], axis=1))
        self._hashes = np.concatenate(hashes) if hashes else np.zeros(0, np.int64)
        self._places = np.concatenate(places) if places else np.zeros((0, 2), np.int64)
        order = np.argsort(self._hashes, kind="stable")
        self._hashes, self._places = self._hashes[order], self._places[order]

    def find(self, rows: Sequence[Row]) -> Known:
        """Earlier records of `rows`, by place: at most two for a row, the later first."""
        wanted = np.array([row_hash(row) for row in rows], np.int64)
        begin, end = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        return {
            int(place): self._records(self._places[begin[place] : end[place]])
            for place in np.flatnonzero(begin < end)
        }

    def _records(self, places: np.ndarray) -> list[Record]:
        """The first record of stopped passes and the first of the index, of places with the same hash."""
        stopped = int(np.searchsorted(places[:, 0], self._of_index))
        firsts = [*places[:stopped][:1], *places[stopped:][:1]]
        return [self._read(int(table), int(row)) for table, row in firsts]

    def _read(self, table: int, row: int) -> Record:
        columns = self._tables[table]
        record = {name: columns.column(name)[row].as_py() for name in (*PROBED, *COUNTED)}
        return record if self._same_tokenizer[table] else record | {name: None for name in COUNTED}


class _Writer:
    """Writes the tables and bad rows of a pass to its working folder."""

    def __init__(
        self, work: Path, specs: Sequence[DatasetSpec], tokenizer: Tokenizer, *, allow_outside: bool
    ) -> None:
        self.work, self.specs, self.tokenizer = work, specs, fingerprint(tokenizer)
        self.wording = wording_tokens(tokenizer)
        self.seen = self.reused = 0
        self.bad: collections.Counter[str] = collections.Counter()
        self.leftovers = self._keep_leftovers()
        self._schema = SCHEMA.with_metadata(
            {"tokenizer": self.tokenizer, "outside": "allowed" if allow_outside else "refused"}
        )
        self._records: list[Record] = []
        self._kept: list[Record] = []
        self._kept_files = 0
        self._files: list[dict[str, object]] = []
        self._digest = hashlib.blake2b(digest_size=12)
        self._since = time.monotonic()
        self._bad_file = open(work / BAD, "w", encoding="utf-8")  # noqa: SIM115

    def _keep_leftovers(self) -> list[Path]:
        """Moves tables of stopped passes to names that this pass does not use; returns them, latest first."""
        for copied in self.work.glob("kept-*.arrow"):  # copies of records in tables that still exist
            copied.unlink()
        folder = self.work / "earlier"
        folder.mkdir(exist_ok=True)
        first = 1 + max((int(path.stem) for path in folder.iterdir()), default=-1)
        for number, path in enumerate(sorted(self.work.glob("rows-*.arrow")), first):
            os.replace(path, folder / f"{number:06d}.arrow")
        return sorted(folder.iterdir(), reverse=True)

    def add(self, found: Found) -> None:
        """Adds the next rows."""
        self.seen += len(found.good) + len(found.bad)
        self.reused += found.reused
        self._records += found.good
        self._kept += found.kept
        for entry in found.bad:
            self.bad[entry.reason] += 1
            self._bad_file.write(entry.line())
        waiting = max(len(self._records), len(self._kept))
        if waiting >= _TABLE_ROWS or time.monotonic() - self._since > _TABLE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the records that are waiting as tables."""
        self._bad_file.flush()
        self._since = time.monotonic()
        if self._kept:
            self._write(f"kept-{self._kept_files:05d}.arrow", self._kept)
            self._kept_files += 1
            self._kept = []
        if not self._records:
            return
        name = f"rows-{len(self._files):05d}.arrow"
        self._write(name, self._records)
        for record in self._records:
            self._digest.update(json.dumps([record[name] for name in _DIGESTED]).encode())
        self._files.append({"file": name, "rows": len(self._records)})
        self._records = []

    def _write(self, name: str, records: list[Record]) -> None:
        write_table(self.work / name, pa.Table.from_pylist(records, schema=self._schema))

    def finish(self) -> IndexReport:
        """Writes meta.json if there is a good row; otherwise keeps the tables of earlier passes."""
        self._bad_file.close()
        report = IndexReport(self.seen - self.bad.total(), self.reused, dict(self.bad))
        if report.rows:
            self._describe()
            shutil.rmtree(self.work / "earlier")
        return report

    def _describe(self) -> None:
        weights = [[spec.name, spec.weight] for spec in self.specs]
        self._digest.update(json.dumps([self.tokenizer, weights]).encode())
        meta = {
            "version": VERSION, "files": self._files, "tokenizer": self.tokenizer,
            "wording": self.wording, "digest": self._digest.hexdigest(), "bad": dict(self.bad),
            "datasets": [{"name": spec.name, "weight": spec.weight} for spec in self.specs],
        }  # fmt: skip
        (self.work / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
