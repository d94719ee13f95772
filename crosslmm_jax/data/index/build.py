"""Making an index: one parallel pass over the rows of a mixture.

What is done lies in a hidden folder beside INDEX until everything is, so INDEX is complete or absent. A pass
that was killed goes on where it stopped, and a pass over a changed mixture probes only what is new, in one
way: rows that an earlier index, finished or not, holds with the same text and unchanged files are taken over.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crosslmm_jax.data.annotations import DatasetSpec, Row, read_mixture, read_rows
from crosslmm_jax.data.index.probe import (
    COUNTED,
    PROBED,
    Found,
    Known,
    Prober,
    fingerprint,
    probe_in_worker,
    row_hash,
    start_worker,
)
from crosslmm_jax.data.index.table import BAD, META, ROW_GROUP, SCHEMA, VERSION
from crosslmm_jax.data.text import Tokenizer, load_tokenizer, wording_tokens
from crosslmm_jax.errors import Fault, UserError
from crosslmm_jax.utils import Progress, atomic_folder, is_vacant, worker_pool

_CHUNK = 64  # rows that a worker gets at once
_TABLE_ROWS = 16 * ROW_GROUP  # rows of one table
_PLANNED = ("row_hash", "duration", "num_frames")  # what makes the plan of a run another
_TABLE_SECONDS = 30.0  # a table is closed after so long, so that a kill costs little


@dataclasses.dataclass(frozen=True)
class IndexReport:
    """What a pass found."""

    rows: int  # good ones
    reused: int  # of them, those that needed no new probe
    bad: dict[str, int]  # reason -> rows

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.rows} rows ({self.reused} unchanged), {sum(self.bad.values())} bad"]
        return lines + [f"  {reason}" for reason in self.reasons()]

    def reasons(self) -> list[str]:
        """How many rows each reason has: "3 missing"."""
        return [f"{count} {reason}" for reason, count in sorted(self.bad.items())]


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
        out: INDEX folder; one that is there is brought up to date.
        tokenizer: folder of the tokenizer that counts tokens.
        media_root: folder of the media where the mixture names none.
        workers: processes; 0 does everything in this one.
        seed: of the mixture's random strategies.
        allow_outside: media paths may leave their root.
        quiet: no progress on stderr.

    Raises:
        UserError: a file of the mixture cannot be read, `out` is no index or cannot be written, no row is
            good, or a worker process died. What is at `out` stays then.
    """
    specs = read_mixture(mixture, media_root=media_root)
    loaded = load_tokenizer(tokenizer)
    target = Path(os.path.realpath(out))  # a link stays one
    if not (target / META).exists() and not is_vacant(target):
        raise UserError(f"--out {out}: exists and is no index; name another folder")
    with atomic_folder(target, resume=True) as work:
        writer = _Writer(work, specs, loaded, allow_outside=allow_outside)
        tables = [path for kind in ("rows", "kept") for path in sorted(target.glob(f"{kind}-*.parquet"))]
        earlier = _EarlierRows((writer.leftovers, tables), writer.tokenizer, allow_outside=allow_outside)
        progress = Progress("index", unit="rows", quiet=quiet)
        items = (item for spec in specs for item in read_rows(spec, seed=seed, allow_outside=allow_outside))
        try:
            with _probing(Prober(loaded, allow_outside=allow_outside), tokenizer, workers) as submit:
                for found in _in_order(items, earlier, submit, ahead=2 * workers + 1):
                    writer.add(found)
                    progress.update(writer.seen, f"{sum(writer.bad.values())} bad")
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, perhaps for want of memory; run the same command again, with fewer"
                " --workers: it goes on where it stopped"
            ) from error
        finally:
            progress.close()
            writer.flush()
        report = writer.finish()
        if not report.rows:
            why = f" ({', '.join(report.reasons())})" if report.bad else ""
            stays = ", so the index there stays" if (target / META).exists() else ""
            raise UserError(f"{out}: no usable row{why}{stays}; {work / BAD} tells more")
    return report


Submit = Callable[[list[Row], Known], "Future[Found]"]


@contextlib.contextmanager
def _probing(prober: Prober, tokenizer: str, workers: int) -> Iterator[Submit]:
    """A function that probes rows, here or in worker processes."""
    if not workers:

        def here(rows: list[Row], known: Known) -> "Future[Found]":
            future: Future[Found] = Future()
            future.set_result(prober(rows, known))
            return future

        yield here
        return
    pool = worker_pool(workers, start_worker, tokenizer, prober.allow_outside)
    try:
        yield lambda rows, known: pool.submit(probe_in_worker, rows, known)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    items: Iterator[Row | Fault], earlier: "_EarlierRows", submit: Submit, *, ahead: int
) -> Iterator[Found]:
    """What is found for `items`, chunk by chunk and in their order; `ahead` chunks are under way."""
    waiting: collections.deque[tuple[Future[Found], list[Fault]]] = collections.deque()
    rows: list[Row] = []
    bad: list[Fault] = []

    def collect() -> Found:
        future, unread = waiting.popleft()
        found = future.result()
        return found._replace(bad=sorted([*unread, *found.bad], key=lambda entry: entry.row))

    for item in items:
        if isinstance(item, Fault):
            bad.append(item)
        else:
            rows.append(item)
        if len(rows) + len(bad) == _CHUNK:
            waiting.append((submit(rows, earlier.find(rows)), bad))
            rows, bad = [], []
            if len(waiting) >= ahead:
                yield collect()
    waiting.append((submit(rows, earlier.find(rows)), bad))
    while waiting:
        yield collect()


class _EarlierRows:
    """Rows of earlier tables by their hash: those of passes that were stopped, and those of the index.

    Where a medium changed in between, both have a record of a row, and one of them has the right stamp.
    """

    def __init__(
        self, paths: tuple[Sequence[Path], Sequence[Path]], tokenizer: str, *, allow_outside: bool
    ) -> None:
        self._files: list[Path] = []  # not kept open: there may be more than a process may open
        self._same_tokenizer: list[bool] = []
        self._of_index = 0  # number of the index's first table
        hashes, places = [], []
        for place, path in enumerate([*paths[0], *paths[1]]):
            try:
                with pq.ParquetFile(path) as file:
                    found = file.read(columns=["row_hash"]).column(0).to_numpy()
                    schema = file.schema_arrow
            except (OSError, pa.ArrowException):
                continue  # damaged: its rows are probed again
            if not set(SCHEMA.names) <= set(schema.names):
                continue  # of an earlier version
            made_by = schema.metadata or {}
            if made_by.get(b"outside") == b"allowed" and not allow_outside:
                continue  # nobody looked where its links lead
            number = len(self._files)
            self._of_index += place < len(paths[0])
            self._files.append(path)
            self._same_tokenizer.append(made_by.get(b"tokenizer", b"").decode() == tokenizer)
            hashes.append(found)
            places.append(np.stack([np.full(len(found), number), np.arange(len(found))], axis=1))
        self._hashes = np.concatenate(hashes) if hashes else np.zeros(0, np.int64)
        self._places = np.concatenate(places) if places else np.zeros((0, 2), np.int64)
        order = np.argsort(self._hashes, kind="stable")
        self._hashes, self._places = self._hashes[order], self._places[order]
        # Rows mostly come in the earlier order.
        self._read_group = functools.lru_cache(maxsize=4)(self._read_group)

    def find(self, rows: Sequence[Row]) -> Known:
        """By place in `rows`, what is known of those that are known: at most two records, the later first."""
        wanted = np.array([row_hash(row) for row in rows], np.int64)
        begin, end = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        return {
            int(place): self._records(self._places[begin[place] : end[place]])
            for place in np.flatnonzero(begin < end)
        }

    def _records(self, places: np.ndarray) -> list[dict[str, Any]]:
        """Of places of the same hash, the first of stopped passes and the first of the index."""
        stopped = int(np.searchsorted(places[:, 0], self._of_index))
        firsts = [*places[:stopped][:1], *places[stopped:][:1]]
        return [self._read(int(file), int(row)) for file, row in firsts]

    def _read_group(self, file: int, group: int) -> pa.Table:
        with pq.ParquetFile(self._files[file]) as opened:
            return opened.read_row_group(group, columns=[*PROBED, *COUNTED])

    def _read(self, file: int, row: int) -> dict[str, Any]:
        group, place = divmod(row, ROW_GROUP)
        record = self._read_group(file, group).slice(place, 1).to_pylist()[0]
        return record if self._same_tokenizer[file] else record | {name: None for name in COUNTED}


class _Writer:
    """Tables and bad rows of the pass, in its working folder."""

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
        self._records: list[dict[str, Any]] = []
        self._kept: list[dict[str, Any]] = []
        self._kept_files = 0
        self._files: list[dict[str, Any]] = []
        self._digest = hashlib.blake2b(digest_size=12)
        self._since = time.monotonic()
        self._bad_file = open(work / BAD, "w", encoding="utf-8")  # noqa: SIM115

    def _keep_leftovers(self) -> list[Path]:
        """Tables of passes that were stopped, under names that this pass does not use, the last one first."""
        for copied in self.work.glob("kept-*.parquet"):  # from tables that are still there
            copied.unlink()
        folder = self.work / "earlier"
        folder.mkdir(exist_ok=True)
        first = 1 + max((int(path.stem) for path in folder.iterdir()), default=-1)
        for number, path in enumerate(sorted(self.work.glob("rows-*.parquet")), first):
            os.replace(path, folder / f"{number:06d}.parquet")
        return sorted(folder.iterdir(), reverse=True)

    def add(self, found: Found) -> None:
        """Takes the rows that follow."""
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
        """Writes the tables that are being filled."""
        self._bad_file.flush()
        self._since = time.monotonic()
        if self._kept:
            self._write_table(f"kept-{self._kept_files:05d}.parquet", self._kept)
            self._kept_files += 1
            self._kept = []
        if not self._records:
            return
        name = f"rows-{len(self._files):05d}.parquet"
        self._write_table(name, self._records)
        for record in self._records:
            self._digest.update(json.dumps([record[name] for name in _PLANNED]).encode())
        self._files.append({"file": name, "rows": len(self._records)})
        self._records = []

    def _write_table(self, name: str, records: list[dict[str, Any]]) -> None:
        table = pa.Table.from_pylist(records, schema=self._schema)
        temporary = self.work / f"{name}.incomplete"
        pq.write_table(table, temporary, row_group_size=ROW_GROUP, compression="zstd")
        os.replace(temporary, self.work / name)

    def finish(self) -> IndexReport:
        """Writes what describes the whole, if there is a good row; else what earlier passes found stays."""
        self._bad_file.close()
        report = IndexReport(sum(entry["rows"] for entry in self._files), self.reused, dict(self.bad))
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
