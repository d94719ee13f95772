"""A row number to an `Example`: decode its media, tokenise its turns, and stand in for damaged files."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import Row
from crosslmm_jax.data.batching import Bucket
from crosslmm_jax.data.index import RowStore, only_data_errors
from crosslmm_jax.data.loading.collate import Example
from crosslmm_jax.data.media import Clip, open_media, read_frames
from crosslmm_jax.data.text import ClipMeta, Tokenizer, TokenSequence, check_placeholders, tokenise
from crosslmm_jax.errors import DataError, Fault, UserError

_SUBSTITUTES = 8  # other rows that are tried when the media of a row cannot be read


class FrameCache:
    """Decoded clips, kept until `limit` bytes are used and never given up again.

    A shuffled epoch visits every clip once, so giving up old clips for new ones would only lose hits.
    """

    def __init__(self, limit: int) -> None:
        """Holds at most `limit` bytes of frames; 0 keeps nothing."""
        self.limit = limit
        self.used = 0
        self._clips: dict[Any, Clip] = {}
        self._lock = threading.Lock()

    def get(self, key: Any) -> Clip | None:
        """The clip put under `key`, or None."""
        return self._clips.get(key)

    def put(self, key: Any, clip: Clip) -> None:
        """Keeps `clip` if there is room."""
        with self._lock:
            if key not in self._clips and self.used + clip.frames.nbytes <= self.limit:
                self._clips[key] = clip
                self.used += clip.frames.nbytes

    def __getstate__(self) -> int:
        """A copy sent to another process starts empty."""
        return self.limit

    def __setstate__(self, limit: int) -> None:
        """See `__getstate__`."""
        self.__init__(limit)


class ExampleLoader:
    """Loads rows by number. Calls may come from several threads."""

    def __init__(self, rows: RowStore, config: DataConfig, *, tokenizer: Tokenizer, image_size: int) -> None:
        """Loads from `rows`; frames become `image_size` pixels square."""
        self.rows = rows
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.cache = FrameCache(config.frame_cache_mb * 2**20)

    def __call__(
        self, number: int, bucket: Bucket, stand_in: Callable[[int], int]
    ) -> tuple[Example, list[Fault]]:
        """The example of row `number`, or of its substitute, and the rows that failed on the way.

        Args:
            number: of the row.
            bucket: that it has to fit.
            stand_in: the row that takes its place at attempt 1, 2, ...

        Raises:
            UserError: when the row and all its substitutes fail.
        """
        bad: list[Fault] = []
        for attempt in range(1 + _SUBSTITUTES):
            found = self.load(number if attempt == 0 else stand_in(attempt), bucket)
            if isinstance(found, Example):
                return found, bad
            bad.append(found)
        raise UserError(
            f"{bad[0]} (and {_SUBSTITUTES} rows in its place failed too; are the media where the index says?)"
        )

    def load(self, number: int, bucket: Bucket) -> Example | Fault:
        """The example of row `number`, or what is wrong with its media."""
        row = self.rows[number]
        try:
            sequence, clips = self._read_row(row, min(bucket.text, self.config.most_text_tokens))
        except DataError as error:
            return dataclasses.replace(row.fault(error.fault), row=number)
        example = Example(sequence, clips, number, row.where)
        if example.num_frames > bucket.frames:
            detail = f"brings {example.num_frames} frames, more than its probe told"
            fault = Fault(row.where, "changed", f"{detail}; run `crosslmm data index` again")
            return dataclasses.replace(row.fault(fault), row=number)
        return example

    def _read_row(self, row: Row, limit: int) -> tuple[TokenSequence, tuple[Clip, ...]]:
        """Tokens of a row, at most `limit` that are not visual, and the clips that they show."""
        config = self.config
        check_placeholders(row.turns, len(row.media), where=row.where)
        timed = config.time_instruction != "none"
        clips = self._clips(row, len(row.media)) if timed else ()
        sequence = tokenise(
            row.turns, self.tokenizer, where=row.where, style=config.style, label_mode=config.label_mode,
            system_prompt=config.system_prompt, time_instruction=config.time_instruction,
            clips=[ClipMeta(len(clip.frames), clip.duration, clip.times.tolist()) for clip in clips],
            max_text_tokens=limit,
        )  # fmt: skip
        if not timed:
            clips = self._clips(row, sequence.num_media)
        return sequence, clips[: sequence.num_media]

    def _clips(self, row: Row, count: int) -> tuple[Clip, ...]:
        return tuple(self._clip(row, reference) for reference in row.media[:count])

    def _clip(self, row: Row, reference: str) -> Clip:
        key = (row.root, reference, row.bounds)
        clip = self.cache.get(key)
        if clip is None:
            clip = self._read(row, reference)
            clip.frames.flags.writeable = False
            clip.times.flags.writeable = False
            self.cache.put(key, clip)
        return clip

    def _read(self, row: Row, reference: str) -> Clip:
        config = self.config
        with only_data_errors(row.root, reference):
            medium = open_media(row.root, reference, allow_outside=config.allow_outside)
            return read_frames(
                medium, config.sampling, size=self.image_size, bounds=row.bounds,
                resampling=config.resampling, deadline_s=config.deadline_s,
            )  # fmt: skip
