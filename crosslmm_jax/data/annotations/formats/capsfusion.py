"""CapsFusion as img2dataset downloads it: Parquet with key, status and caption, and the images beside it.

img2dataset writes `<shard>.parquet` and either a folder `<shard>/<key>.jpg` or a tar `<shard>.tar`. The
Parquet files that CapsFusion publishes hold URLs only. They are refused with a hint.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crosslmm_jax.data.annotations.json_files import files_of
from crosslmm_jax.data.annotations.options import choice_option, fill_path, path_option, text_option
from crosslmm_jax.data.annotations.parquet_files import open_parquet
from crosslmm_jax.data.annotations.rows import CAPTION_QUESTIONS, DatasetSpec, Entry, Origin, Row
from crosslmm_jax.errors import UserError

OPTIONS = frozenset({"caption", "images", "path", "question"})
_PATHS = {"files": "{shard}/{key}.jpg", "tar": "{shard}.tar::{key}.jpg"}


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The rows of all files in order, read in batches.

    Options:
        caption: name of the column; capsfusion if there is one, else caption.
        images: files (the default) or tar.
        path: template of an image's path, with {shard} and {key}.
        question: asks for the caption.

    Raises:
        UserError: an option is wrong, or a file cannot be read or has no such columns.
    """
    images = choice_option(spec, "images", ("files", "tar"))
    path = path_option(spec, _PATHS[images], ("shard", "key"))
    question = text_option(spec, "question", CAPTION_QUESTIONS["images"])
    for file in files_of(spec.path, ".parquet"):
        for number, row in enumerate(_rows(file, spec)):
            where = f"{file}: row {number}"
            if row["key"] is not None:
                where += f" (key {row['key']})"
            yield Entry(where, {**row, "shard": Path(file).stem, "path": path, "question": question})


def _rows(file: str, spec: DatasetSpec) -> Iterator[dict[str, object]]:
    """`key`, `status` and `caption` of each row of a file."""
    with open_parquet(file) as table:
        columns = set(table.schema_arrow.names)
        default = "capsfusion" if "capsfusion" in columns else "caption"
        caption = text_option(spec, "caption", default)
        if missing := {"key", "status", caption} - columns:
            hint = "download its images with img2dataset and name the Parquet files that it wrote"
            raise UserError(f"{file}: has no column {sorted(missing)[0]!r}; {hint}")
        for batch in table.iter_batches(batch_size=4096, columns=["key", "status", caption]):
            for row in batch.to_pylist():
                yield {"key": row["key"], "status": row["status"], "caption": row[caption]}


def to_row(value: Mapping[str, Any], origin: Origin) -> Row:
    """The row of one image. Raises DataError when it was not downloaded or has no caption."""
    path = fill_path(value["path"], value, origin)
    if value["status"] != "success":
        detail = f"img2dataset did not download it (status {value['status']!r})"
        raise origin.error("not_downloaded", detail, path)
    return origin.make_row(origin.caption_turns(value["question"], value["caption"]), images=[path])
