"""Turns a row number into an `Example`: media decoded, text tokenised. Replaces rows that cannot be used."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import Row
from crosslmm_jax.data.batching import Bucket
from crosslmm_jax.data.index import RowStore, only_data_errors
from crosslmm_jax.data.media import Clip, open_media, read_frames
from crosslmm_jax.data.text import ClipMeta, Tokenizer, TokenSequence, check_placeholders, tokenise
from crosslmm_jax.errors import DataError, Fault, UserError

_REPLACEMENTS = 8  # rows that are tried in place of one that cannot be used


@dataclasses.dataclass(frozen=True)
class Example:
    """A row ready for a batch.

    Attributes:
        sequence: tokens of the row, with a MEDIUM for each clip.
        clips: images and videos of the row, in order.
        row_index: number of the row in the index.
        where: file, row and id, for messages.
    """

    sequence: TokenSequence
    clips: tuple[Clip, ...]
    row_index: int
    where: str = "row"

    @property
    def num_frames(self) -> int:
        """Frames of all media."""
        return sum(len(clip.frames) for clip in self.clips)


class FrameCache:
    """Keeps decoded clips until `limit` bytes are used, and never evicts one.

    A shuffled epoch visits every clip once, so evicting old clips for new ones would only lose hits.
    """

    def __init__(self, limit: int) -> None:
        """Holds at most `limit` bytes of frames; 0 keeps nothing."""
        self.limit = limit
        self.used = 0
        self._clips: dict[Hashable, Clip] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Clip | None:
        """The clip of `key`, or None."""
        return self._clips.get(key)

    def put(self, key: Hashable, clip: Clip) -> None:
        """Keeps `clip` if there is room."""
        with self._lock:
            if key not in self._clips and self.used + clip.frames.nbytes <= self.limit:
                self._clips[key] = clip
                self.used += clip.frames.nbytes

    def __getstate__(self) -> int:
        """A copy in another process starts empty."""
        return self.limit

    def __setstate__(self, limit: int) -> None:
        """See `__getstate__`."""
        self.__init__(limit)


class ExampleLoader:
    """Loads rows by number. Calls may come from several threads."""

    def __init__(self, rows: RowStore, config: DataConfig, *, tokenizer: Tokenizer, image_size: int) -> None:
        """Loads from `rows`, with frames of `image_size` x `image_size` pixels."""
        self.rows = rows
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.cache = FrameCache(config.frame_cache_mb * 2**20)

    def load_or_replace(
        self, number: int, bucket: Bucket, replacement: Callable[[int], int]
    ) -> tuple[Example, list[Fault]]:
        """The example of row `number` or, if it cannot be used, of a row in its place.

        Args:
            number: number of the row.
            bucket: bucket of the batch.
            replacement: attempt 1, 2, ... -> number of the row to try instead.

        Returns:
            The example, and the faults of the rows that failed before it.

        Raises:
            UserError: the row and all its replacements failed.
        """
        faults: list[Fault] = []
        for attempt in range(1 + _REPLACEMENTS):
            found = self.load(number if attempt == 0 else replacement(attempt), bucket)
            if isinstance(found, Example):
                return found, faults
            faults.append(found)
        raise UserError(
            f"{faults[0]} (and {_REPLACEMENTS} rows in its place failed too; are the media where the index"
            " says?)"
        )

    def load(self, number: int, bucket: Bucket) -> Example | Fault:
        """The example of row `number`, or why it cannot be used."""
        row = self.rows[number]
        try:
            sequence, clips = self._read_row(row, number, min(bucket.text, self.config.most_text_tokens))
        except UserError as error:
            fault = error.fault if isinstance(error, DataError) else Fault(row.where, "other", str(error))
            return dataclasses.replace(row.fault(fault), row=number)
        example = Example(sequence, clips, number, row.where)
        if example.num_frames > bucket.frames:
            detail = f"has {example.num_frames} frames, more than when it was indexed"
            fault = Fault(row.where, "changed", f"{detail}; run `crosslmm data index` again")
            return dataclasses.replace(row.fault(fault), row=number)
        return example

    def _read_row(self, row: Row, number: int, limit: int) -> tuple[TokenSequence, tuple[Clip, ...]]:
        """Tokens of row `number`, with at most `limit` text tokens, and the clips of its media."""
        config = self.config
        check_placeholders(row.turns, len(row.media), where=row.where)
        timed = config.time_instruction != "none"
        clips = self._read_clips(row, number, len(row.media)) if timed else ()
        sequence = tokenise(
            row.turns, self.tokenizer, where=row.where, style=config.style, label_mode=config.label_mode,
            system_prompt=config.system_prompt, time_instruction=config.time_instruction,
            clips=[ClipMeta(len(clip.frames), clip.duration, clip.times.tolist()) for clip in clips],
            max_text_tokens=limit,
        )  # fmt: skip
        if not timed:
            clips = self._read_clips(row, number, sequence.num_media)
        return sequence, clips[: sequence.num_media]

    def _read_clips(self, row: Row, number: int, count: int) -> tuple[Clip, ...]:
        damaged = self.rows.damaged(number)[:count]
        return tuple(map(functools.partial(self._read_clip, row), row.media[:count], damaged))

    def _read_clip(self, row: Row, reference: str, damaged: int | None) -> Clip:
        key = (row.root, reference, row.bounds, row.media_options)
        clip = self.cache.get(key)
        if clip is None:
            clip = self._decode(row, reference, damaged)
            clip.frames.flags.writeable = False
            clip.times.flags.writeable = False
            self.cache.put(key, clip)
        return clip

    def _decode(self, row: Row, reference: str, damaged: int | None) -> Clip:
        config = self.config
        with only_data_errors(row.root, reference):
            medium = open_media(row.root, reference, row.media_options, allow_outside=config.allow_outside)
            return read_frames(
                medium._replace(damaged=damaged), config.sampling, size=self.image_size, bounds=row.bounds,
                resampling=config.resampling, deadline_s=config.deadline_s, max_damaged=config.max_damaged,
            )  # fmt: skip
