"""InternVid: JSONL, or a JSON list, with the id of a video, start and end of a clip, and its caption.

Either the whole videos are there (`<id>.mp4`, read from start to end) or clips that were cut from them
(`<id>_<start>_<end>.mp4`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from crosslmm_jax.data.annotations.json_files import expand_files, read_json_rows
from crosslmm_jax.data.annotations.options import choice_option, fill, map_option, path_option, text_option
from crosslmm_jax.data.annotations.rows import (
    DatasetSpec,
    Entry,
    Origin,
    Row,
    caption_turns,
    make_row,
    parse_bounds,
)

OPTIONS = frozenset({"fields", "clips", "path", "question"})
_FIELDS = {
    "video": "YoutubeID", "start": "Start_timestamp", "end": "End_timestamp", "caption": "Caption",
}  # fmt: skip
_PATHS = {"whole": "{video}.mp4", "cut": "{video}_{start}_{end}.mp4"}
_QUESTION = "Describe the video briefly."


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """Rows in order; JSONL is read line by line.

    Options: `fields` names the fields for video, start, end and caption; `clips` is whole (default) or cut;
    `path` of a file, made of {video}, {start} and {end} as they are written; `question` asks for the caption.

    Raises:
        UserError: an option is wrong, or a file cannot be read.
    """
    clips = choice_option(spec, "clips", ("whole", "cut"))
    path = path_option(spec, _PATHS[clips], ("video", "start", "end"))
    question = text_option(spec, "question", _QUESTION)
    fields = map_option(spec, "fields", _FIELDS)
    for file in expand_files(spec.path):
        for where, value in read_json_rows(file):
            if isinstance(value, Mapping):
                picked = {name: value.get(field) for name, field in fields.items()}
                value = (picked, path, question, clips == "cut")
            yield Entry(where, value)


def to_row(value: Any, origin: Origin) -> Row:
    """A row of one clip. Raises DataError when it cannot be used."""
    if not isinstance(value, tuple):
        raise origin.error("malformed", "must be an object with video, start, end and caption; see `fields`")
    picked, path, question, cut = value
    bounds = parse_bounds(origin, picked["start"], picked["end"])
    names = {name: _as_written(picked[name]) for name in ("video", "start", "end")}
    turns = caption_turns(origin, question, picked["caption"])
    return make_row(origin, turns, videos=[fill(path, names, origin)], bounds=None if cut else bounds)


def _as_written(value: Any) -> Any:
    """A number as its text: 12 and 12.5, which file names hold as they stand in the annotations."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
