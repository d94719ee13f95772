"""MovieChat-1K: one JSON file per video, with questions about all of it, about moments, and a caption.

    {"info": {"video_path", "fps", ...}, "global": [{"question", "answer"}],
     "breakpoint": [{"question", "time", "answer"}], "caption": "..."}

A video gives one row for its global questions, one for its caption, and one per breakpoint. The question of a
breakpoint is about "now", so the row reads the video up to its `time`, which is the number of a frame.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from crosslmm_jax.data.annotations.json_files import read_json_folder
from crosslmm_jax.data.annotations.options import choices_option, text_option
from crosslmm_jax.data.annotations.rows import LONG_CAPTION_QUESTION, DatasetSpec, Entry, Origin, Row
from crosslmm_jax.errors import Fault

OPTIONS = frozenset({"parts", "question"})
_PARTS = ("global", "breakpoint", "caption")


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The parts of each file, file by file.

    Options:
        parts: some of global, breakpoint and caption; all by default.
        question: asks for the caption.

    Raises:
        UserError: an option is wrong.
    """
    parts = choices_option(spec, "parts", _PARTS, _PARTS)
    question = text_option(spec, "question", LONG_CAPTION_QUESTION)
    for where, value in read_json_folder(spec.path):
        if isinstance(value, Fault):
            yield Entry(where, value)
        elif not isinstance(value, Mapping) or not isinstance(value.get("info"), Mapping):
            yield Entry(where, Fault(where, "malformed", "must be an object with info"))
        else:
            found = False
            for part in parts:
                for suffix, content in _contents(part, value.get(part)):
                    found = True
                    name = f"{where}: {part}{suffix}"
                    yield Entry(name, (part, value["info"], content, question))
            if not found:
                detail = f"holds none of {', '.join(parts)}"
                yield Entry(where, Fault(where, "conversation", detail))


def _contents(part: str, content: object) -> list[tuple[str, object]]:
    """The contents of one part that become one row each, each with a suffix for its name."""
    if not content:
        return []
    if part == "breakpoint" and isinstance(content, list):
        return [(f"[{number}]", [item]) for number, item in enumerate(content)]
    return [("", content)]


def to_row(value: Any, origin: Origin) -> Row:
    """The row of one part of a file."""
    part, info, content, question = value
    bounds = None
    if part == "caption":
        turns = origin.caption_turns(question, content)
    else:
        turns = _questions(content, origin)
        if part == "breakpoint":
            bounds = (0.0, _moment(content[0].get("time"), info.get("fps"), origin))
    return origin.make_row(
        turns, videos=[info.get("video_path")], bounds=bounds, options=origin.media_options(info)
    )


def _questions(pairs: object, origin: Origin) -> list[dict[str, str]]:
    if not isinstance(pairs, list) or not all(isinstance(pair, Mapping) for pair in pairs):
        raise origin.error("conversation", "must be a list of objects with question and answer")
    turns = []
    for number, pair in enumerate(pairs):
        question, answer = pair.get("question"), pair.get("answer")
        for text in (question, answer):
            if not isinstance(text, str) or not text.strip():
                raise origin.error("conversation", "a question or an answer is missing or no text")
        turns.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return turns


def _moment(frame: object, fps: object, origin: Origin) -> float:
    """Seconds from the start of the video to the end of frame number `frame`."""
    most = sys.float_info.max  # JSON has larger integers
    if (
        isinstance(frame, int | float)
        and isinstance(fps, int | float)
        and 0 <= frame <= most
        and 0 < fps <= most
    ):
        return (frame + 1) / fps
    detail = f"time {frame!r} and fps {fps!r} must be the number of a frame and frames per second"
    raise origin.error("clip_times", detail)
