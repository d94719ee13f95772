"""What indexing finds about a row: its media by a probe, its tokens by counting."""

import collections
import contextlib
import functools
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from crosslmm_jax.data.annotations import DatasetSpec, Entry, Row, make_row
from crosslmm_jax.data.index.blocks import BAD_SCHEMA, BlockKey, EarlierBlock, bad_path
from crosslmm_jax.data.index.lookup import Lookup
from crosslmm_jax.data.index.table import (
    COUNTED,
    PROBED,
    SCHEMA,
    ProbeOptions,
    Record,
    map_table,
    record_of,
    row_of,
)
from crosslmm_jax.data.media import (
    Media,
    MediaOptions,
    VideoInfo,
    direct_reference,
    is_image,
    open_media,
    probe,
    split_reference,
)
from crosslmm_jax.data.text import Tokenizer, count_plain_tokens, count_tokens, load_tokenizer, writable
from crosslmm_jax.errors import DataError, Fault, UserError

_KEPT_PROBES = 50_000  # a video often has many rows, one after another


def row_hash(row: Row) -> int:
    """int64 hash of what a row says, without its number, its file and its media root."""
    turns = [[turn.role, turn.text] for turn in row.turns]
    # None where the options are the defaults, so that rows of earlier versions keep their hash.
    options = None if row.media_options == MediaOptions() else row.media_options
    content = [row.dataset, row.modality, row.media, row.bounds, turns, options]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of a tokenizer: its vocabulary, and how it splits a sample text."""
    vocabulary = sorted(tokenizer.vocabulary().items())
    sample = tokenizer.encode_plain("The quick brown fox, 1234.5 s: Ünïcode 漢字\n\n  <image>")
    return hashlib.blake2b(json.dumps([vocabulary, sample]).encode(), digest_size=12).hexdigest()


def media_stamp(root: str, reference: str) -> int | None:
    """A hash of size and modification time of a file, or of all images in a folder.

    For "a.tar::b.mp4" that of the tar. None when there is no such file.
    """
    path = os.path.join(root, split_reference(reference)[0])
    try:
        names, found = [], [os.stat(path)]
        if stat.S_ISDIR(found[0].st_mode):
            names = sorted(filter(is_image, os.listdir(path)))
            found = [os.stat(os.path.join(path, name)) for name in names] or found
    except (OSError, ValueError):
        return None
    return zlib.crc32(json.dumps([names, [[one.st_size, one.st_mtime_ns] for one in found]]).encode())


def _stamps_hold(table: pa.RecordBatch) -> bool:
    """Whether no medium of a table's rows has changed."""
    stamps = table.column("stamp").flatten().fill_null(-1).to_numpy()
    media = table.column("media").flatten().dictionary_encode()
    row_of_medium = table.column("media").value_parent_indices().to_numpy()
    roots = table.column("root").indices.to_numpy()[row_of_medium]
    names, folders = media.dictionary.to_pylist(), table.column("root").dictionary.to_pylist()
    # A video often has many rows.
    files, of_medium = np.unique(
        roots.astype(np.int64) * len(names) + media.indices.to_numpy(), return_inverse=True
    )
    found = [media_stamp(folders[file // len(names)], names[file % len(names)]) for file in files.tolist()]
    known = np.array([-1 if stamp is None else stamp for stamp in found], np.int64)
    return bool(np.array_equal(known[of_medium], stamps))


class Chunk(NamedTuple):
    """Some entries of a block, in order.

    Attributes:
        key: the block.
        spec: its data set.
        entries: number and entry.
        lookup: folder for `Lookup`; None where earlier passes know nothing about the rows.
    """

    key: BlockKey
    spec: DatasetSpec
    entries: Sequence[tuple[int, Entry]]
    lookup: str | None = None


class Found(NamedTuple):
    """What is found about the rows of a chunk.

    Attributes:
        key: the block.
        good: records of the good rows, by SCHEMA.
        bad: the others in order, by BAD_SCHEMA.
        reused: number of good rows that needed no new probe.
    """

    key: BlockKey
    good: pa.RecordBatch
    bad: pa.RecordBatch
    reused: int


class Prober:
    """Makes records of the index from rows."""

    def __init__(self, tokenizer_folder: str, options: ProbeOptions) -> None:
        """Counts tokens with a tokenizer."""
        self.tokenizer_folder = tokenizer_folder
        self.options = options
        self._last_lookup: tuple[str, Lookup] | None = None
        self._probes = collections.OrderedDict[tuple[str, str, bool, MediaOptions], Record | Fault]()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when it is needed first: in a worker, only if a row's tokens are not known."""
        return load_tokenizer(self.tokenizer_folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process starts empty."""
        return functools.partial(Prober, self.tokenizer_folder, self.options), ()

    def __call__(self, chunk: Chunk) -> Found:
        """Makes the rows of a chunk, probes their media, and counts their tokens."""
        good: list[Record] = []
        bad: list[Record] = []
        reused = 0
        rows = [
            make_row(chunk.spec, number, entry, allow_outside=self.options.allow_outside)
            for number, entry in chunk.entries
        ]
        hashes = [row_hash(row) if isinstance(row, Row) else 0 for row in rows]
        known = self._lookup(chunk.lookup).find(hashes) if chunk.lookup else [[]] * len(rows)
        for row, number, records in zip(rows, hashes, known, strict=True):
            if isinstance(row, Fault):
                bad.append({"dataset": row.dataset, "row": row.row, "fault": row.line()})
                continue
            record, fault, again = self._index(row, records)
            record["row_hash"] = number
            if fault is None:
                good.append(record)
                reused += again
            else:
                bad.append(record | {"fault": fault.line()})
        return Found(
            chunk.key, pa.RecordBatch.from_pylist(good, schema=SCHEMA),
            pa.RecordBatch.from_pylist(bad, schema=BAD_SCHEMA), reused,
        )  # fmt: skip

    def is_current(self, block: EarlierBlock) -> bool:
        """Whether a pass over the same annotations would write this block again.

        That is so if no medium of its good rows changed, and its bad rows are still bad.
        """
        try:
            good = map_table(block.rows, ("root", "media", "stamp"))
            bad = map_table(path) if (path := bad_path(block.rows)).exists() else None
        except (OSError, KeyError, pa.ArrowException):
            return False
        if not _stamps_hold(good):
            return False
        unread = bad.column("turns").is_null().to_pylist() if bad is not None else []
        for place in (place for place, is_unread in enumerate(unread) if not is_unread):
            record = bad.slice(place, 1).to_pylist()[0]  # type: ignore[union-attr]
            _, fault, _ = self._index(row_of(record), [record] if record["stamp"] is not None else [])
            known = json.loads(record["fault"])
            if fault is None or (fault.reason, fault.path) != (known["reason"], known["path"]):
                return False
        return True

    def _lookup(self, folder: str) -> Lookup:
        if self._last_lookup is None or self._last_lookup[0] != folder:
            self._last_lookup = folder, Lookup(folder)
        return self._last_lookup[1]

    def _index(self, row: Row, records: Sequence[Record]) -> tuple[Record, Fault | None, bool]:
        """The record of a row, its fault, and whether one of the earlier `records` made a probe unnecessary.

        A bad row keeps what was found about its media, so that a disk that was not mounted is not probed
        again.
        """
        record: Record = record_of(row)
        stamps = [media_stamp(row.root, name) for name in row.media] if records else []
        earlier = next((one for one in records if one["stamp"] == stamps and self.options.settles(one)), None)
        if earlier is not None:
            record |= {name: earlier[name] for name in PROBED}
        else:
            fault = self._probe_media(row, record)
            if fault is not None:
                facts: Record = dict.fromkeys(PROBED) | {"media": list(row.media)}
                if records and fault.reason == "missing":
                    facts = {name: records[0][name] for name in (*PROBED, *COUNTED)}
                return record | facts, fault, False
        fault = late_start(row, record["duration"])
        if fault is not None:
            return record, fault, False
        if earlier is not None and earlier["text_tokens"] is not None:
            record |= {name: earlier[name] for name in COUNTED}
        else:
            record |= self._count(row)
        return record, None, earlier is not None

    def _count(self, row: Row) -> Record:
        plain = count_plain_tokens(row.turns, self.tokenizer)
        return count_tokens(row.turns, self.tokenizer) | {"plain_tokens": plain}

    def _probe_media(self, row: Row, record: Record) -> Fault | None:
        """Adds what a probe finds about the media to `record`, or returns what is wrong with them."""
        record |= {name: [] for name in PROBED}
        for reference in row.media:
            key = (row.root, reference, row.modality == "video", row.media_options)
            if key not in self._probes:
                self._probes[key] = _probe(row, reference, options=self.options)
                if len(self._probes) > _KEPT_PROBES:
                    self._probes.popitem(last=False)
            facts = self._probes[key]
            if isinstance(facts, Fault):
                return row.fault(facts)
            for name in PROBED:
                record[name].append(facts[name])
        return None


def probe_for(row: Row, medium: Media, options: ProbeOptions = ProbeOptions()) -> VideoInfo:  # noqa: B008
    """Probes a medium of a row. Raises DataError, "wrong_type" for a video that the row calls an image."""
    info = probe(medium, decode_up_to=options.decode_up_to, max_damaged=options.max_damaged)
    if row.modality != "video" and info.duration > 0:  # of a single frame too
        raise DataError(medium, "wrong_type", "is a video; name it under video in its row")
    return info


def late_start(row: Row, durations: Sequence[float]) -> Fault | None:
    """The fault of a row whose clip starts when one of its videos (`durations`, seconds) has ended."""
    if row.bounds is None:
        return None
    start = row.bounds[0]
    for reference, duration in zip(row.media, durations, strict=True):
        if 0 < duration <= start:  # the duration of an image is 0
            detail = f"start {start:g} is not within the video, which lasts {duration:g} seconds"
            return row.fault(Fault(row.where, "clip_times", detail, reference))
    return None


def _probe(row: Row, reference: str, *, options: ProbeOptions) -> Record | Fault:
    before = media_stamp(row.root, reference)
    try:
        with only_data_errors(row.root, reference):
            medium = open_media(row.root, reference, row.media_options, allow_outside=options.allow_outside)
            info = probe_for(row, medium, options)
    except DataError as error:
        return error.fault
    facts = {name: getattr(info, name) for name in PROBED if name not in ("media", "stamp")}
    return facts | {"media": direct_reference(reference, medium), "stamp": before}


@contextlib.contextmanager
def only_data_errors(root: str, reference: str) -> Iterator[None]:
    """Turns every error of reading the medium `reference` below `root` into a DataError.

    Names of images in a folder may be no valid text, so its fault is made writable.
    """
    path = os.path.join(root, reference)
    try:
        yield
    except DataError as error:
        fault = error.fault
        raise DataError(writable(fault.where), fault.reason, writable(fault.detail), reference) from error
    except UserError as error:
        detail = str(error).removeprefix(f"{path}: ")
        raise DataError(writable(path), "other", writable(detail), reference) from error
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        # PyAV raises many kinds for damaged files, e.g. UnicodeDecodeError for names in their metadata.
        reason = f"{type(error).__name__}: {error}"
        detail = f"cannot be decoded ({reason}); replace the file"
        raise DataError(writable(path), "corrupt", writable(detail), reference) from error
