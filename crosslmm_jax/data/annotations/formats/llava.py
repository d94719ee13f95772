"""LLaVA's annotations: a JSON list of rows, or JSONL with a row a line."""

from collections.abc import Iterator, Mapping
from typing import Any

from crosslmm_jax.data.annotations.json_files import read_json_rows
from crosslmm_jax.data.annotations.rows import DatasetSpec, Entry, Origin, Row, make_row, parse_bounds
from crosslmm_jax.data.text import writable


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """Rows of a file in order; JSONL is read line by line.

    Raises:
        UserError: naming the file, when it cannot be read or is no JSON.
    """
    yield from read_json_rows(spec.path)


def to_row(value: Any, origin: Origin) -> Row:
    """A row of `id`, `image` or `video`, `conversations`, and `start` and `end` of a part of the video.

    A row with both is an image row, as in LLaVA, unless the data set's media_type says otherwise.

    Raises:
        DataError: the row cannot be used.
    """
    if not isinstance(value, Mapping):
        raise origin.error("malformed", "must be an object with conversations and image or video")
    if "conversations" not in value:
        raise origin.error("conversation", "conversations is missing")
    media_type = origin.spec.media_type
    fields = {"image": ["image"], "video": ["video"], "text": []}.get(media_type or "", ["image", "video"])
    media = {"images": [], "videos": []}
    for field in fields:
        if names := media_names(value, field, origin):
            media[field + "s"] = names
            break
    return make_row(
        origin,
        value["conversations"],
        bounds=parse_bounds(origin, value.get("start"), value.get("end")),
        read_type=read_type_of(value, origin),
        **media,
    )


def media_names(value: Mapping[str, Any], field: str, origin: Origin) -> list[str]:
    """The path or paths under `field`, or []. Raises DataError when it holds something else."""
    names = value.get(field) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise origin.error("malformed", f"{field} must be a path or a list of paths")
    return names


def read_type_of(value: Mapping[str, Any], origin: Origin) -> str | None:
    """`video_read_type` of one row. Raises DataError when it is no text."""
    read_type = value.get("video_read_type")
    if read_type is not None and (not isinstance(read_type, str) or writable(read_type) != read_type):
        raise origin.error("malformed", "video_read_type must be text")
    return read_type
