"""The formats of annotations: each gives the entries of a data set in order, and makes a row of an entry."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from crosslmm_jax.data.annotations.formats import (
    capsfusion,
    internvid,
    llava,
    moviechat,
    tfds,
    videochat2,
    vript,
    webdataset,
)
from crosslmm_jax.data.annotations.rows import DatasetSpec, Entry, Origin, Row


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        entries: the entries of a data set in order, read as they are asked for. Raises UserError for a file
            that cannot be read.
        to_row: the row of an entry. Raises DataError.
        options: keys of `DatasetSpec.options` that it knows.
        many_files: a data set of it is a folder, or a pattern of files in one.
    """

    entries: Callable[[DatasetSpec], Iterator[Entry]]
    to_row: Callable[[Any, Origin], Row]
    options: frozenset[str] = frozenset()
    many_files: bool = False


FORMATS = {
    "llava": Format(llava.entries, llava.to_row),
    "videochat2": Format(llava.entries, videochat2.to_row),
    "moviechat": Format(moviechat.entries, moviechat.to_row, moviechat.OPTIONS, many_files=True),
    "vript": Format(vript.entries, vript.to_row, vript.OPTIONS, many_files=True),
    "internvid": Format(internvid.entries, internvid.to_row, internvid.OPTIONS, many_files=True),
    "webdataset": Format(webdataset.entries, webdataset.to_row, webdataset.OPTIONS, many_files=True),
    "capsfusion": Format(capsfusion.entries, capsfusion.to_row, capsfusion.OPTIONS, many_files=True),
    "tfds": Format(tfds.entries, tfds.to_row, tfds.OPTIONS),
}
