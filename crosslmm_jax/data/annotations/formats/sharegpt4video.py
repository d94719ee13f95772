"""ShareGPT4Video: JSONL of {"video_path", "captions": [{"idx", "content"}]}, a caption per part of a video.

The caption with `idx` -1 is that of the whole video. The captions of keyframes are left out: each tells what
has changed since the one before it.
"""

from collections.abc import Iterator, Mapping

from crosslmm_jax.data.annotations.json_files import read_json_objects
from crosslmm_jax.data.annotations.options import text_option
from crosslmm_jax.data.annotations.rows import LONG_CAPTION_QUESTION, DatasetSpec, Entry, Origin, Row

OPTIONS = frozenset({"question"})


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The rows in order.

    Options:
        question: asks for the caption.

    Raises:
        UserError: the option is wrong, or the file cannot be read.
    """
    question = text_option(spec, "question", LONG_CAPTION_QUESTION)
    yield from read_json_objects(spec.path, question)


def to_row(value: object, origin: Origin) -> Row:
    """The row of the caption of a whole video."""
    if not isinstance(value, tuple):
        raise origin.error("malformed", "must be an object with video_path and captions")
    row, question = value
    captions = row.get("captions")
    if not isinstance(captions, list) or not all(isinstance(caption, Mapping) for caption in captions):
        raise origin.error("malformed", "captions must be a list of objects with idx and content")
    whole = [caption.get("content") for caption in captions if str(caption.get("idx")) == "-1"]
    if len(whole) != 1:
        raise origin.error(
            "conversation", f"captions holds {len(whole)} with idx -1; one must be of the video"
        )
    turns = origin.caption_turns(question, whole[0])
    return origin.make_row(turns, videos=[row.get("video_path")], options=origin.media_options(row))
