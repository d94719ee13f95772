"""A row number to an `Example`: decode its media, tokenise its turns, and stand in for damaged files."""

import dataclasses
import threading
import zlib
from typing import Any

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.annotations import Row
from crosslmm_jax.data.clip import Clip
from crosslmm_jax.data.collate import Example
from crosslmm_jax.data.conversation import TokenSequence, chat_sequence, plain_sequence
from crosslmm_jax.data.tokenizer import Tokenizer
from crosslmm_jax.data.video import read_frames
from crosslmm_jax.errors import UserError

_SUBSTITUTES = 8  # other rows that are tried when the media of a row cannot be read


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row whose media could not be read, and why."""

    row_index: int
    reason: str


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

    def __init__(self, rows: list[Row], config: DataConfig, *, tokenizer: Tokenizer, image_size: int) -> None:
        """Loads from `rows`; frames become `image_size` pixels square."""
        self.rows = rows
        self.config = config
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.cache = FrameCache(config.frame_cache_mb * 2**20)

    def __call__(self, index: int) -> tuple[Example, list[BadRow]]:
        """The example of row `index`, or of its substitute, and the rows that failed on the way.

        Which row stands in depends on `index` alone, so that every run and every host picks the same.

        Raises:
            UserError: when the row and all its substitutes fail.
        """
        bad: list[BadRow] = []
        for attempt in range(1 + _SUBSTITUTES):
            chosen = index if attempt == 0 else zlib.crc32(f"{index}/{attempt}".encode()) % len(self.rows)
            row = self.rows[chosen]
            sequence = self.tokenise(row)
            try:
                clips = tuple(self._clip(path, row.bounds) for path in row.media)
            except UserError as error:
                bad.append(BadRow(row.index, f"{row.where}: {error}"))
                continue
            return Example(sequence, clips, row.index, row.where), bad
        raise UserError(
            f"{bad[0].reason} (and {_SUBSTITUTES} rows in its place failed too; check media_root)"
        )

    def tokenise(self, row: Row) -> TokenSequence:
        """Token ids of a row under the configured style."""
        config = self.config
        if config.style == "plain":
            return plain_sequence(row.turns, self.tokenizer, where=row.where)
        return chat_sequence(
            row.turns, self.tokenizer, system_prompt=config.system_prompt, label_mode=config.label_mode
        )

    def _clip(self, path: str, bounds: tuple[float, float] | None) -> Clip:
        key = (path, bounds)
        clip = self.cache.get(key)
        if clip is None:
            clip = read_frames(path, self.config.sampling, size=self.image_size, bounds=bounds)
            clip.frames.flags.writeable = False
            clip.times.flags.writeable = False
            self.cache.put(key, clip)
        return clip
