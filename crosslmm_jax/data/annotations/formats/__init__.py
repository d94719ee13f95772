"""Formats of annotations: one file per format, one table of them all (`FORMATS`, below).

How to add a data format:

1. Write `formats/my_format.py` with two functions. `entries` reads the files, `to_row` checks one entry:

       def entries(spec: DatasetSpec) -> Iterator[Entry]:
           yield from read_json_rows(spec.path)

       def to_row(value: object, origin: Origin) -> Row:
           if not isinstance(value, Mapping):
               raise origin.error("malformed", "must be an object with clip and text")
           turns = origin.caption_turns("Describe the video.", value.get("text"))
           return origin.make_row(turns, videos=[value.get("clip")])

2. Add a line to FORMATS:
   `"my_format": Format(my_format.entries, my_format.to_row, fields={"clip", "text"})`.
   With `fields` or `suffix` a mixture need not name the format.
3. Write a few rows of it in `tests/data/lookalikes.py`, and what they must become in
   `tests/data/annotations/test_formats.py`.

| to | use |
|---|---|
| read JSON, JSONL, folders of them, patterns | `annotations/json_files.py` |
| build a checked `Row` | `origin.make_row`, `origin.caption_turns`, `origin.bounds` |
| read settings of a mixture's `options` | `annotations/options.py` |
| refuse one row | `raise origin.error(reason, detail)`, with a reason of `crosslmm_jax.errors.REASONS` |
| refuse a file | `raise UserError(...)` in `entries`, naming the file and the fix |
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from crosslmm_jax.data.annotations.formats import (
    capsfusion,
    internvid,
    llava,
    llava_parquet,
    moviechat,
    sharegpt4video,
    tfds,
    video_chatgpt,
    videochat2,
    vript,
    webdataset,
)
from crosslmm_jax.data.annotations.rows import DatasetSpec, Entry, Origin, Row

__all__ = ["FORMATS", "Format"]


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        entries: reads the entries of a data set, in order and lazily. Raises UserError for a file that cannot
            be read.
        to_row: makes the row of an entry's value. Raises DataError.
        options: keys of `DatasetSpec.options` that it knows.
        fields: fields that each of its rows has and those of other formats lack, to detect it in JSON, or in
            files with `suffix`.
        aliases: other names of its fields -> the names in `fields`.
        suffix: suffix of its files, to detect it, e.g. ".tar".
        many_files: a data set is a folder or a pattern of files, and not one file.
    """

    entries: Callable[[DatasetSpec], Iterator[Entry]]
    to_row: Callable[[Any, Origin], Row]
    options: Set[str] = frozenset()
    fields: Set[str] = frozenset()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    suffix: str = ""
    many_files: bool = False

    def has_fields(self, names: Set[str]) -> bool:
        """Whether a row with these fields is of this format."""
        return self.fields <= names | {self.aliases[name] for name in names if name in self.aliases}


FORMATS = {
    "llava": Format(llava.entries, llava.to_row, fields={"conversations"}, aliases=llava.ALIASES),
    "llava_parquet": Format(
        llava_parquet.entries,
        llava_parquet.to_row,
        fields={"conversations"},
        aliases=llava.ALIASES,
        suffix=".parquet",
        many_files=True,
    ),
    "videochat2": Format(llava.entries, videochat2.to_row, fields={"QA"}),
    "moviechat": Format(
        moviechat.entries, moviechat.to_row, moviechat.OPTIONS, fields={"info", "global"}, many_files=True
    ),
    "vript": Format(vript.entries, vript.to_row, vript.OPTIONS, fields={"meta", "data"}, many_files=True),
    "sharegpt4video": Format(
        sharegpt4video.entries,
        sharegpt4video.to_row,
        sharegpt4video.OPTIONS,
        fields={"video_path", "captions"},
    ),
    "video_chatgpt": Format(
        video_chatgpt.entries,
        video_chatgpt.to_row,
        video_chatgpt.OPTIONS,
        fields={"q", "a", "video_id"},
    ),
    "internvid": Format(
        internvid.entries,
        internvid.to_row,
        internvid.OPTIONS,
        fields={"YoutubeID", "Caption"},
        many_files=True,
    ),
    "webdataset": Format(
        webdataset.entries, webdataset.to_row, webdataset.OPTIONS, suffix=".tar", many_files=True
    ),
    "capsfusion": Format(
        capsfusion.entries,
        capsfusion.to_row,
        capsfusion.OPTIONS,
        fields={"key", "status"},
        suffix=".parquet",
        many_files=True,
    ),
    "tfds": Format(tfds.entries, tfds.to_row, tfds.OPTIONS),
}
