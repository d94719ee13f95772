"""What indexing finds out about a row: its media by a probe, its tokens by counting."""

import collections
import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from crosslmm_jax.data.annotations import Row
from crosslmm_jax.data.index.table import record_of
from crosslmm_jax.data.media import (
    Media,
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
Known = Mapping[int, Sequence[Mapping[str, Any]]]  # earlier records of rows, by their place
_KEPT_PROBES = 50_000  # a video often has many rows, one after the other


def row_hash(row: Row) -> int:
    """int64 of all that a row says, its place and the folder of its media aside."""
    turns = [[turn.role, turn.text] for turn in row.turns]
    content = [row.dataset, row.modality, row.media, row.bounds, turns, row.read_type]
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def fingerprint(tokenizer: Tokenizer) -> str:
    """Tells tokenizers apart by their vocabulary and by how they cut a text."""
    vocabulary = sorted(tokenizer.hf_tokenizer.get_vocab().items())
    sample = tokenizer.encode_plain("The quick brown fox, 1234.5 s: Ünïcode 漢字\n\n  <image>")
    return hashlib.blake2b(json.dumps([vocabulary, sample]).encode(), digest_size=12).hexdigest()


def stamp(root: str, reference: str) -> int | None:
    """Of a file's size and time of change, or of those of all pictures in a folder.

    Of "a.tar::b.mp4" that of the tar. None when it is not there.
    """
    path = os.path.join(root, split_reference(reference)[0])
    try:
        names = sorted(filter(is_image, os.listdir(path))) if os.path.isdir(path) else []
        found = [os.stat(os.path.join(path, name)) for name in names] or [os.stat(path)]
    except (OSError, ValueError):
        return None
    return zlib.crc32(json.dumps([names, [[one.st_size, one.st_mtime_ns] for one in found]]).encode())


class Found(NamedTuple):
    """What a probe of rows finds.

    Attributes:
        good: records of the good rows.
        bad: the others.
        kept: earlier records of bad ones whose media are not there, for when they are again.
        reused: how many good rows needed no new probe.
    """

    good: list[dict[str, Any]]
    bad: list[Fault]
    kept: list[dict[str, Any]]
    reused: int


class Prober:
    """Rows to records of the index."""

    def __init__(self, tokenizer: Tokenizer, *, allow_outside: bool = False) -> None:
        """Counts tokens with `tokenizer`; `allow_outside`: media may lie outside their root."""
        self.tokenizer = tokenizer
        self.allow_outside = allow_outside
        self._probes: collections.OrderedDict[Any, dict[str, Any] | Fault] = collections.OrderedDict()

    def __call__(self, rows: Sequence[Row], known: Known) -> "Found":
        """Probes rows.

        Args:
            rows: to be indexed.
            known: by place in `rows`, what earlier passes say of the same row, the last one first. Its token
                counts are None when another tokenizer made them.
        """
        good, bad, kept, reused = [], [], [], 0
        for place, row in enumerate(rows):
            record: dict[str, Any] = record_of(row) | {"row_hash": row_hash(row)}
            records = known.get(place, ())
            stamps = [stamp(row.root, name) for name in row.media] if records else []
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
        return Found(good, bad, kept, reused)

    def _count(self, row: Row) -> dict[str, Any]:
        try:
            plain = plain_sequence(row.turns, self.tokenizer, where=row.where).num_text_tokens
        except UserError:
            plain = 0
        return count_tokens(row.turns, self.tokenizer) | {"plain_tokens": plain}

    def _probe_media(self, row: Row, record: dict[str, Any]) -> Fault | None:
        """Adds the media's facts to `record`, or says what is wrong with them."""
        record |= {name: [] for name in PROBED}
        for reference in row.media:
            key = (row.root, reference, row.modality == "video", row.read_type)
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
    """What a medium of `row` is like. Raises DataError; "wrong_type" for a video called an image."""
    info = probe(medium)
    if row.modality != "video" and info.duration > 0:  # of a single frame too
        raise DataError(medium, "wrong_type", "is a video; name it under video in its row")
    return info


def late_start(row: Row, durations: Sequence[float]) -> Fault | None:
    """What is wrong when the part of a row begins where one of its videos, of `durations`, has ended."""
    if row.bounds is None:
        return None
    start = row.bounds[0]
    for reference, duration in zip(row.media, durations, strict=True):
        if 0 < duration <= start:  # an image lasts 0 and has no parts
            detail = f"start {start:g} is not within the video, which lasts {duration:g} seconds"
            return row.fault(Fault(row.where, "clip_times", detail, reference))
    return None


def _probe(row: Row, reference: str, *, allow_outside: bool) -> dict[str, Any] | Fault:
    before = stamp(row.root, reference)
    try:
        with guarded(row.root, reference):
            medium = open_media(row.root, reference, allow_outside=allow_outside)
            info = probe_for(row, medium)
    except DataError as error:
        return error.fault
    facts = {name: getattr(info, name) for name in PROBED if name not in ("media", "stamp")}
    return facts | {"media": direct_reference(reference, medium), "stamp": before}


@contextlib.contextmanager
def guarded(root: str, reference: str) -> Iterator[None]:
    """Turns whatever reading the medium `reference` below `root` raises into a DataError.

    Its message can be written to any file: names of pictures in a folder may be no text.
    """
    try:
        yield
    except DataError as error:
        fault = error.fault
        raise DataError(writable(fault.where), fault.reason, writable(fault.detail), reference) from error
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        # Damaged files make PyAV raise all kinds: UnicodeDecodeError on names in their metadata, for one.
        reason = f"{type(error).__name__}: {error}"
        path, detail = os.path.join(root, reference), f"cannot be decoded ({reason}); replace the file"
        raise DataError(writable(path), "corrupt", writable(detail), reference) from error


_PROBER: Prober | None = None  # of this worker process


def start_worker(tokenizer_folder: str, allow_outside: bool) -> None:
    """Loads what a worker process needs once."""
    global _PROBER
    _PROBER = Prober(load_tokenizer(tokenizer_folder), allow_outside=allow_outside)


def probe_in_worker(rows: Sequence[Row], known: Known) -> Found:
    """`Prober.__call__` in a worker process."""
    assert _PROBER is not None
    return _PROBER(rows, known)
