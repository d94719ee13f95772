"""Builds an index: one parallel pass over the rows of a mixture.

The pass writes to a hidden folder beside INDEX and publishes it at the end, so INDEX is complete or absent.
What earlier passes found is used again, whether they were finished or not:

- Where the annotations of a data set did not change, its blocks are taken over as they are, once the stamps
  of their media hold and their bad rows are still bad.
- Elsewhere, a row with the same text and unchanged files keeps its probe.

So a pass that was killed resumes, and a pass over a changed mixture probes only what is new.
"""

import itertools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from crosslmm_jax.data.annotations import DatasetSpec, read_entries, read_mixture
from crosslmm_jax.data.index.blocks import (
    BLOCK,
    BlockKey,
    EarlierBlock,
    Origins,
    Shard,
    bad_path,
    earlier_blocks,
    keep_leftovers,
    origins_of,
    read_meta,
    take_block,
    write_block,
)
from crosslmm_jax.data.index.lookup import write_lookup
from crosslmm_jax.data.index.probe import Chunk, Found, Prober, fingerprint
from crosslmm_jax.data.index.publish import IndexReport, publish, shard_folder
from crosslmm_jax.data.index.table import BAD, META, ProbeOptions, map_table
from crosslmm_jax.data.media import DECODE_UP_TO, MAX_DAMAGED
from crosslmm_jax.data.text import wording_tokens
from crosslmm_jax.errors import UserError, list_counts
from crosslmm_jax.utils import Progress, atomic_folder, is_vacant, map_in_order

_CHUNK = 64  # entries per task of a worker
_PART_SECONDS = 30.0  # a part of a block is written after this time, so that a kill loses little
_PART = "rows-part.arrow"
_IF_ONE_DIES = "run the same command again with fewer --workers: it resumes where it stopped"


def build_index(
    mixture: str,
    out: str | os.PathLike[str],
    *,
    tokenizer: str,
    media_root: str | None = None,
    path_map: str | None = None,
    workers: int = 0,
    seed: int = 0,
    allow_outside: bool = False,
    decode_up_to: int | None = DECODE_UP_TO,
    max_damaged: float = MAX_DAMAGED,
    shard: Shard | None = None,
    quiet: bool = False,
) -> IndexReport:
    """Indexes a mixture.

    Args:
        mixture: a YAML file, or one file of annotations.
        out: INDEX folder; an existing index is updated.
        tokenizer: folder of the tokenizer that counts tokens.
        media_root: folder of the media where the mixture names none.
        path_map: YAML file that maps beginnings of the mixture's paths to local folders.
        workers: worker processes; 0: this process does everything.
        seed: seed of the random strategies of the mixture.
        allow_outside: media paths may leave their root.
        decode_up_to: most frames of a video that is decoded to count damaged frames; None: all videos are.
        max_damaged: a video is refused if a larger share of its frames is damaged.
        shard: the part of the index to make, for `merge_index`; None: all of it.
        quiet: show no progress on stderr.

    Raises:
        UserError: a file of the mixture cannot be read, `out` is no index or cannot be written, no row is
            good, or a worker process died. `out` is then unchanged.
    """
    specs = read_mixture(mixture, media_root=media_root, path_map=path_map)
    options = ProbeOptions(allow_outside, decode_up_to, max_damaged)
    prober = Prober(tokenizer, options)
    origins = origins_of(
        specs, tokenizer=fingerprint(prober.tokenizer), wording=wording_tokens(prober.tokenizer), seed=seed,
        options=options,
    )  # fmt: skip
    index = Path(os.path.realpath(out))  # a symbolic link stays one
    if not (index / META).exists() and not is_vacant(index):
        raise UserError(f"--out {out}: exists and is no index; name another folder")
    target = index if shard is None else shard_folder(index, shard)
    finished = [target] if shard is None else [target, index]
    progress = Progress("index", unit="rows", quiet=quiet)
    with atomic_folder(target, resume=True) as work:
        pass_ = _Pass(work, finished, origins, prober, workers=workers, shard=shard, progress=progress)
        try:
            pass_.take_current_blocks()
            pass_.index_the_rest(specs, seed=seed)
        finally:
            progress.close()
            pass_.write_part()
        report = publish(work, origins.to_json(), reused=pass_.reused, shard=shard)
        if not report.rows and shard is None:
            why = f" ({', '.join(list_counts(report.bad))})" if report.bad else ""
            stays = ", so the old index stays" if (target / META).exists() else ""
            raise UserError(f"{out}: no usable row{why}{stays}; see {work / BAD}")
        pass_.clean_up()
    return report


class _Pass:
    """One pass over a mixture, which fills the folder `work` with blocks."""

    def __init__(
        self, work: Path, finished: Sequence[Path], origins: Origins, prober: Prober, *, workers: int,
        shard: Shard | None, progress: Progress,
    ) -> None:  # fmt: skip
        """`finished`: indexes, or shards of one, to take blocks from."""
        self.reused = 0
        self._work, self._origins, self._prober, self._workers = work, origins, prober, workers
        self._shard = shard or Shard()
        self._progress, self._seen, self._bad = progress, 0, 0
        self._taken: set[BlockKey] = set()
        # Source of a data set -> all its blocks, where they are known.
        self._complete: dict[str, set[int]] = {}
        (work / META).unlink(missing_ok=True)
        self._earlier = list(earlier_blocks(keep_leftovers(work), leftover=True))
        for folder in finished:
            meta = read_meta(folder)
            self._earlier += earlier_blocks(sorted(folder.glob("rows-*.arrow")), leftover=False)
            if meta and meta.get("shard") in (None, list(shard or ())):
                keys = [BlockKey.of_file(Path(entry["file"])) for entry in meta["files"]]
                for place, dataset in enumerate(meta["datasets"]):
                    held = {key.block for key in keys if key is not None and key.dataset == place}
                    self._complete.setdefault(dataset.get("source", ""), held)
        if origins.outside == "refused":  # media of the others may be links out of the root
            self._earlier = [one for one in self._earlier if one.metadata.get("outside") == "refused"]
        self._key: BlockKey | None = None  # of the block that is being made
        self._found: list[Found] = []
        self._since = time.monotonic()

    def take_current_blocks(self) -> None:
        """Takes over the blocks of unchanged annotations whose media did not change either."""
        number = {name: place for place, name in enumerate(self._origins.names)}
        candidates: list[tuple[BlockKey, EarlierBlock]] = []
        for block in self._earlier:
            made_from = block.metadata
            if made_from.get("dataset") in number and made_from.get("block", "").isdecimal():
                key = BlockKey(number[made_from["dataset"]], int(made_from["block"]))
                if made_from == self._origins.metadata(key) and self._shard.has(key):
                    candidates.append((key, block))
        current = map_in_order(
            self._prober.is_current, (block for _, block in candidates), workers=self._workers,
            spare=self._workers + 1, if_one_dies=_IF_ONE_DIES,
        )  # fmt: skip
        for (key, block), is_current in zip(candidates, current, strict=True):
            if not is_current or key in self._taken:
                continue
            target = self._work / key.rows_name()
            take_block(block, target)
            self._taken.add(key)
            rows = len(map_table(target, ["row_hash"]))
            bad = len(map_table(bad_path(target), ["row_hash"])) if bad_path(target).exists() else 0
            self.reused += rows
            self._count(rows, bad)

    def index_the_rest(self, specs: Sequence[DatasetSpec], *, seed: int) -> None:
        """Makes the blocks that were not taken over."""
        results = map_in_order(
            self._prober, self._chunks(specs, seed), workers=self._workers, spare=self._workers + 1,
            if_one_dies=_IF_ONE_DIES,
        )  # fmt: skip
        for found in results:
            if found.key != self._key:
                self._finish_block()
                self._key = found.key
            self._found.append(found)
            self.reused += found.reused
            self._count(len(found.good), len(found.bad))
            if time.monotonic() - self._since > _PART_SECONDS:
                self.write_part()
        self._finish_block()

    def _chunks(self, specs: Sequence[DatasetSpec], seed: int) -> Iterator[Chunk]:
        for number, spec in enumerate(specs):
            blocks = self._complete.get(self._origins.sources[number])
            ours = {key for block in blocks or () if self._shard.has(key := BlockKey(number, block))}
            if blocks and ours <= self._taken:
                continue  # nothing is left to read
            lookup = write_lookup(
                self._work / "lookup" / str(number),
                [one for one in self._earlier if one.metadata.get("dataset") == spec.name],
                tokenizer=self._origins.tokenizer,
            )
            numbered = read_entries(spec, seed=seed)
            for block, entries in itertools.groupby(numbered, lambda one: one[0] // BLOCK):
                key = BlockKey(number, block)
                if key in self._taken or not self._shard.has(key):
                    continue
                while some := list(itertools.islice(entries, _CHUNK)):
                    yield Chunk(key, spec, some, lookup)

    def _count(self, good: int, bad: int) -> None:
        self._seen += good + bad
        self._bad += bad
        self._progress.update(self._seen, f"{self._bad} bad")

    def _finish_block(self) -> None:
        if self._key is not None:
            self._write(self._key.rows_name(), self._origins.metadata(self._key))
            for path in (self._work / _PART, bad_path(self._work / _PART)):
                path.unlink(missing_ok=True)
        self._key, self._found, self._since = None, [], time.monotonic()

    def write_part(self) -> None:
        """Writes what there is of the block that is being made, for a pass that continues after a stop."""
        self._since = time.monotonic()
        if self._key is not None:
            self._write(_PART, self._origins.metadata(self._key) | {"block": "part"})

    def _write(self, name: str, metadata: dict[str, str]) -> None:
        good, bad = [one.good for one in self._found], [one.bad for one in self._found]
        write_block(self._work / name, good, bad, metadata)

    def clean_up(self) -> None:
        """Deletes what only a later pass over the same folder would use."""
        shutil.rmtree(self._work / "earlier")
        shutil.rmtree(self._work / "lookup", ignore_errors=True)
