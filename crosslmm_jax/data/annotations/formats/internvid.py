"""InternVid: JSONL, or a JSON list, with the id of a video, start and end of a clip, and its caption.

On disk are either whole videos (`<id>.mp4`, read from start to end) or clips (`<id>_<start>_<end>.mp4`).
"""

from collections.abc import Iterator, Mapping

from crosslmm_jax.data.annotations.json_files import expand_files, read_json_rows
from crosslmm_jax.data.annotations.options import (
    choice_option,
    fill_path,
    map_option,
    path_option,
    text_option,
)
from crosslmm_jax.data.annotations.rows import CAPTION_QUESTIONS, DatasetSpec, Entry, Origin, Row

OPTIONS = frozenset({"fields", "clips", "path", "question"})
_FIELDS = {
    "video": "YoutubeID", "start": "Start_timestamp", "end": "End_timestamp", "caption": "Caption",
    "stream": "stream", "folder_fps": "folder_fps",
}  # fmt: skip
_PATHS = {"whole": "{video}.mp4", "cut": "{video}_{start}_{end}.mp4"}


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The rows in order.

    Options:
        fields: map of video, start, end, caption, stream and folder_fps to names of fields.
        clips: whole (the default) or cut.
        path: template of a file's path, with {video}, {start} and {end} as the row writes them.
        question: asks for the caption.

    Raises:
        UserError: an option is wrong, or a file cannot be read.
    """
    clips = choice_option(spec, "clips", ("whole", "cut"))
    path = path_option(spec, _PATHS[clips], ("video", "start", "end"))
    question = text_option(spec, "question", CAPTION_QUESTIONS["videos"])
    fields = map_option(spec, "fields", _FIELDS)
    for file in expand_files(spec.path):
        for where, value in read_json_rows(file):
            if isinstance(value, Mapping):
                picked = {name: value.get(field) for name, field in fields.items()}
                value = (picked, path, question, clips == "cut")
            yield Entry(where, value)


def to_row(value: object, origin: Origin) -> Row:
    """The row of one clip."""
    if not isinstance(value, tuple):
        raise origin.error("malformed", "must be an object with video, start, end and caption; see `fields`")
    picked, path, question, cut = value
    bounds = origin.bounds(picked["start"], picked["end"])
    names = {name: _as_written(picked[name]) for name in ("video", "start", "end")}
    turns = origin.caption_turns(question, picked["caption"])
    return origin.make_row(
        turns, videos=[fill_path(path, names, origin)], bounds=None if cut else bounds,
        options=origin.media_options(picked),
    )  # fmt: skip


def _as_written(value: object) -> object:
    """A number as text, "12" or "12.5": names of files hold it as the annotations write it."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
