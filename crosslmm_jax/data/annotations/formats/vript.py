"""Vript: one JSON file a video, with a caption for each of its scenes, which are clips of their own.

    {"meta": {"video_id", ...}, "data": {"<id>-Scene-001": {"video_id", "clip_id", "caption":
        {"shot_type", "camera_movement", "content", "scene_title"}, "voiceover": [...]}}}

Several videos may also stand in a .jsonl file, one a line.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from crosslmm_jax.data.annotations.json_files import read_json_folder
from crosslmm_jax.data.annotations.options import choices_option, fill, path_option, text_option
from crosslmm_jax.data.annotations.rows import DatasetSpec, Entry, Origin, Row, caption_turns, make_row
from crosslmm_jax.errors import Fault

OPTIONS = frozenset({"path", "parts", "question"})
_PARTS = ("scene_title", "shot_type", "camera_movement", "content")
_QUESTION = "Describe the scene in detail."


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The scenes, file by file.

    Options: `path` of a clip ("{video_id}/{clip_id}.mp4"); `parts` of the caption to train, by default
    content, where the others carry their names; and `question`, which asks for the caption.

    Raises:
        UserError: an option is wrong.
    """
    parts = choices_option(spec, "parts", _PARTS, ("content",))
    path = path_option(spec, "{video_id}/{clip_id}.mp4", ("video_id", "clip_id"))
    question = text_option(spec, "question", _QUESTION)
    for where, value in read_json_folder(spec.path):
        if isinstance(value, Fault):
            yield Entry(where, value)
            continue
        scenes = value.get("data") if isinstance(value, Mapping) else None
        if not isinstance(scenes, Mapping) or not scenes:
            yield Entry(where, Fault(where, "malformed", "must be an object with data, a map of scenes"))
            continue
        for name, scene in scenes.items():
            yield Entry(f"{where}: {name}", (name, scene, path, parts, question))


def to_row(value: Any, origin: Origin) -> Row:
    """A row of one scene. Raises DataError when it cannot be used."""
    name, scene, path, parts, question = value
    caption = scene.get("caption") if isinstance(scene, Mapping) else None
    if not isinstance(caption, Mapping):
        raise origin.error("malformed", "a scene must be an object with caption, an object too")
    lines = []
    for part in parts:
        text = caption.get(part)
        if not isinstance(text, str) or not text.strip():
            raise origin.error("conversation", f"caption: {part} is missing or no text")
        label = "" if part == "content" else part.replace("_", " ").capitalize() + ": "
        lines.append(label + text.strip())
    ids = {"video_id": scene.get("video_id"), "clip_id": scene.get("clip_id", name)}
    turns = caption_turns(origin, question, "\n".join(lines))
    return make_row(origin, turns, videos=[fill(path, ids, origin)])
