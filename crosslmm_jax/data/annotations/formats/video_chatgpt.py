"""Video-ChatGPT's VideoInstruct100K: a JSON list of {"q", "a", "video_id"}, one question per row."""

from collections.abc import Iterator

from crosslmm_jax.data.annotations.json_files import read_json_objects
from crosslmm_jax.data.annotations.options import fill_path, path_option
from crosslmm_jax.data.annotations.rows import DatasetSpec, Entry, Origin, Row

OPTIONS = frozenset({"path"})


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The rows in order.

    Options:
        path: template of a video's path; "{video_id}.mp4" by default.

    Raises:
        UserError: the option is wrong, or the file cannot be read.
    """
    path = path_option(spec, "{video_id}.mp4", ("video_id",))
    yield from read_json_objects(spec.path, path)


def to_row(value: object, origin: Origin) -> Row:
    """The row of one question."""
    if not isinstance(value, tuple):
        raise origin.error("malformed", "must be an object with q, a and video_id")
    row, path = value
    question = row.get("q")
    if not isinstance(question, str) or not question.strip():
        raise origin.error("conversation", "q is missing or no text")
    turns = origin.caption_turns(question.strip(), row.get("a"))
    video = fill_path(path, {"video_id": row.get("video_id")}, origin)
    return origin.make_row(turns, videos=[video], options=origin.media_options(row))
