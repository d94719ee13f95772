"""Vript: one JSON file per video, with a caption per scene; each scene is a clip in a file of its own.

    {"meta": {"video_id", ...}, "data": {"<id>-Scene-001": {"video_id", "clip_id", "caption":
        {"shot_type", "camera_movement", "content", "scene_title"}, "voiceover": [...]}}}

A .jsonl file may hold several videos, one per line.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from crosslmm_jax.data.annotations.json_files import read_json_folder
from crosslmm_jax.data.annotations.options import choices_option, fill_path, path_option, text_option
from crosslmm_jax.data.annotations.rows import DatasetSpec, Entry, Origin, Row
from crosslmm_jax.errors import Fault

OPTIONS = frozenset({"path", "parts", "question"})
_PARTS = ("scene_title", "shot_type", "camera_movement", "content")
_QUESTION = "Describe the scene in detail."


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The scenes, file by file.

    Options:
        path: template of a clip's path; "{video_id}/{clip_id}.mp4" by default.
        parts: parts of the caption to train on; content by default. Each other part starts with its name.
        question: asks for the caption.

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
    """The row of one scene."""
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
    turns = origin.caption_turns(question, "\n".join(lines))
    return origin.make_row(turns, videos=[fill_path(path, ids, origin)], options=origin.media_options(scene))
