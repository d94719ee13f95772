"""What indexing finds about a row: its media by a probe, its tokens by counting."""

import collections
import contextlib
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from crosslmm_jax.data.annotations import Row
from crosslmm_jax.data.index.table import Record, record_of
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
from crosslmm_jax.data.text import Tokenizer, count_tokens, load_tokenizer, plain_sequence, writable
from crosslmm_jax.errors import DataError, Fault, UserError

PROBED = (
    "media", "duration", "fps", "num_frames", "width", "height", "size_bytes", "codec", "keyframe_spacing",
    "stamp",
)  # fmt: skip
COUNTED = ("text_tokens", "answer_tokens", "answer_media", "plain_tokens")
Known = Mapping[int, Sequence[Record]]  # place in a list of rows -> earlier records of that row
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
        names = sorted(filter(is_image, os.listdir(path))) if os.path.isdir(path) else []
        found = [os.stat(os.path.join(path, name)) for name in names] or [os.stat(path)]
    except (OSError, ValueError):
        return None
    return zlib.crc32(json.dumps([names, [[one.st_size, one.st_mtime_ns] for one in found]]).encode())


class Chunk(NamedTuple):
    """Some rows of a mixture, in order.

    Attributes:
        rows: rows to index.
        known: earlier records of the same rows, by place in `rows`, the latest first. Token counts are None
            where another tokenizer made them.
        unread: faults of rows that could not be read.
    """

    rows: Sequence[Row]
    known: Known
    unread: Sequence[Fault] = ()


class Found(NamedTuple):
    """What a probe of rows finds.

    Attributes:
        good: records of the good rows.
        bad: faults of the others, in order.
        kept: earlier records of bad rows whose media are missing, for a pass that finds them again.
        reused: number of good rows that needed no new probe.
    """

    good: list[Record]
    bad: list[Fault]
    kept: list[Record]
    reused: int


class Prober:
    """Makes records of the index from rows."""

    def __init__(self, tokenizer_folder: str, *, allow_outside: bool = False) -> None:
        """Counts tokens with a tokenizer; `allow_outside`: media may lie outside their root."""
        self.tokenizer_folder = tokenizer_folder
        self.allow_outside = allow_outside
        self._probes = collections.OrderedDict[tuple[str, str, bool, MediaOptions], Record | Fault]()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Read when it is needed first: in a worker, only if a row's tokens are not known."""
        return load_tokenizer(self.tokenizer_folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process starts empty."""
        return functools.partial(Prober, self.tokenizer_folder, allow_outside=self.allow_outside), ()

    def __call__(self, chunk: Chunk) -> Found:
        """Probes rows."""
        good, bad, kept, reused = [], [*chunk.unread], [], 0
        for place, row in enumerate(chunk.rows):
            record: Record = record_of(row) | {"row_hash": row_hash(row)}
            records = chunk.known.get(place, ())
            stamps = [media_stamp(row.root, name) for name in row.media] if records else []
            earlier = next((one for one in records if one["stamp"] == stamps), None)
            if earlier is not None:
                record |= {name: earlier[name] for name in PROBED}
            else:
                fault = self._probe_media(row, record)
                if fault is not None:
                    bad.append(fault)
                    if records and fault.reason == "missing":
                        kept.append(record | {name: records[0][name] for name in (*PROBED, *COUNTED)})
                    continue
            fault = late_start(row, record["duration"])
            if fault is not None:
                bad.append(fault)
                continue
            if earlier is not None and earlier["text_tokens"] is not None:
                record |= {name: earlier[name] for name in COUNTED}
            else:
                record |= self._count(row)
            good.append(record)
            reused += earlier is not None
        return Found(good, sorted(bad, key=lambda fault: fault.row), kept, reused)

    def _count(self, row: Row) -> Record:
        try:
            plain = plain_sequence(row.turns, self.tokenizer, where=row.where).num_text_tokens
        except UserError:
            plain = 0
        return count_tokens(row.turns, self.tokenizer) | {"plain_tokens": plain}

    def _probe_media(self, row: Row, record: Record) -> Fault | None:
        """Adds what a probe finds about the media to `record`, or returns what is wrong with them."""
        record |= {name: [] for name in PROBED}
        for reference in row.media:
            key = (row.root, reference, row.modality == "video", row.media_options)
            if key not in self._probes:
                self._probes[key] = _probe(row, reference, allow_outside=self.allow_outside)
                if len(self._probes) > _KEPT_PROBES:
                    self._probes.popitem(last=False)
            facts = self._probes[key]
            if isinstance(facts, Fault):
                return row.fault(facts)
            for name in PROBED:
                record[name].append(facts[name])
        return None


def probe_for(row: Row, medium: Media) -> VideoInfo:
    """Probes a medium of a row. Raises DataError, "wrong_type" for a video that the row calls an image."""
    info = probe(medium)
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


def _probe(row: Row, reference: str, *, allow_outside: bool) -> Record | Fault:
    before = media_stamp(row.root, reference)
    try:
        with only_data_errors(row.root, reference):
            medium = open_media(row.root, reference, row.media_options, allow_outside=allow_outside)
            info = probe_for(row, medium)
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
