"""Finds what earlier passes know about the rows of a data set whose annotations changed, by row hash.

The sorted hashes are files that worker processes map, so they cost memory once.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from crosslmm_jax.data.index.blocks import EarlierBlock, bad_path, facts_of, has_facts
from crosslmm_jax.data.index.table import COUNTED, PROBED, Record, map_table

_COLUMNS = ("row_hash", *PROBED, *COUNTED)


def write_lookup(folder: Path, blocks: Sequence[EarlierBlock], *, tokenizer: str) -> str | None:
    """Writes the lookup of earlier blocks of one data set to `folder`.

    Args:
        folder: is replaced.
        blocks: the latest leftovers first, then the blocks of an index.
        tokenizer: fingerprint; token counts of blocks of another one do not hold.

    Returns:
        The folder for `Lookup`; None when there is nothing to find.
    """
    shutil.rmtree(folder, ignore_errors=True)
    paths, hashes, places = [], [], []
    of_index = 0
    for block in blocks:
        for path in (block.rows, bad_path(block.rows)):
            try:
                table = map_table(path, ["row_hash", "stamp"])
            except (OSError, KeyError, pa.ArrowException):
                continue  # absent or damaged: its rows are probed again
            rows = np.flatnonzero(has_facts(table)).astype(np.int32)
            if len(rows):
                hashes.append(table.column("row_hash").fill_null(0).to_numpy()[rows])
                places.append(np.stack([np.full(len(rows), len(paths), np.int32), rows], axis=1))
                paths.append([str(path), block.metadata.get("tokenizer") == tokenizer])
                of_index += block.leftover
    if not paths:
        return None
    folder.mkdir(parents=True)
    all_hashes = np.concatenate(hashes)
    order = np.argsort(all_hashes, kind="stable")
    np.save(folder / "hashes.npy", all_hashes[order])
    np.save(folder / "places.npy", np.concatenate(places)[order])
    (folder / "tables.json").write_text(json.dumps({"tables": paths, "of_index": of_index}))
    return str(folder)


class Lookup:
    """Records of earlier passes by row hash.

    A row whose medium changed in between may have a record of a stopped pass and one of the index. The stamps
    tell which one holds.
    """

    def __init__(self, folder: str) -> None:
        """Maps what `write_lookup` wrote."""
        content = json.loads((Path(folder) / "tables.json").read_text())
        self._paths: list[tuple[str, bool]] = content["tables"]
        self._of_index: int = content["of_index"]  # the first table of the index
        self._hashes = np.load(Path(folder) / "hashes.npy", mmap_mode="r")
        self._places = np.load(Path(folder) / "places.npy", mmap_mode="r")
        self._tables: dict[int, pa.RecordBatch] = {}

    def find(self, hashes: Sequence[int]) -> list[list[Record]]:
        """Earlier records for each hash: at most two, that of a stopped pass first.

        Token counts are None where another tokenizer made them.
        """
        wanted = np.array(hashes, np.int64)
        begin, end = (np.searchsorted(self._hashes, wanted, side) for side in ("left", "right"))
        return [self._records(self._places[b:e]) for b, e in zip(begin.tolist(), end.tolist(), strict=True)]

    def _records(self, places: np.ndarray) -> list[Record]:
        stopped = int(np.searchsorted(places[:, 0], self._of_index))
        firsts = [*places[:stopped][:1].tolist(), *places[stopped:][:1].tolist()]
        return [self._read(table, row) for table, row in firsts]

    def _read(self, number: int, row: int) -> Record:
        path, same_tokenizer = self._paths[number]
        if number not in self._tables:
            self._tables[number] = map_table(path, _COLUMNS)
        record = facts_of(self._tables[number], row)
        return record if same_tokenizer else record | dict.fromkeys(COUNTED)
