"""Rows on disk: LLaVA's JSON lists and JSONL files, checked before anything is decoded."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from crosslmm_jax.data.conversation import Turn, check_placeholders, parse_turns
from crosslmm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the annotations, still text.

    Attributes:
        index: number of the row over all files.
        where: file, row and id, for messages.
        media: paths of its images, or of its video, inside the media root; empty for a row of text.
        bounds: seconds (start, end) of the part of the video to read, or None for all.
        turns: the conversation.
    """

    index: int
    where: str
    media: tuple[str, ...]
    bounds: tuple[float, float] | None
    turns: tuple[Turn, ...]


def read_annotations(files: Sequence[str], media_root: str) -> list[Row]:
    """Reads all rows of `files` (.json holds a list, .jsonl an object a line), in order.

    Raises:
        UserError: naming file and row, when a file is missing or no JSON, when a row lacks a field, when its
            placeholders do not fit its media, or when a media path leaves `media_root`.
    """
    if not os.path.isdir(media_root):
        raise UserError(f"{media_root}: no such folder; set media_root to where the media lie")
    rows: list[Row] = []
    for file in files:
        for number, entry in enumerate(_entries(file)):
            rows.append(_parse_row(entry, index=len(rows), where=f"{file}: row {number}", root=media_root))
    if not rows:
        raise UserError(f"{', '.join(files)}: holds no rows")
    return rows


def _entries(file: str) -> list[Any]:
    """The objects of one file."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"{file}: cannot be read ({reason}); set annotations to a JSON or JSONL file"
        ) from error
    line = 0
    try:
        if file.endswith(".jsonl"):
            entries = []
            for content in text.split("\n"):
                line += 1
                if content.strip():
                    entries.append(json.loads(content))
            return entries
        entries = json.loads(text)
    except ValueError as error:
        at = line or getattr(error, "lineno", 1)
        raise UserError(f"{file}: line {at} is no valid JSON; mend or download the file again") from error
    if not isinstance(entries, list):
        raise UserError(f"{file}: must hold a list of rows; name a file of one row a line .jsonl")
    return entries


def _parse_row(entry: Any, *, index: int, where: str, root: str) -> Row:
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: must be an object with conversations and image or video")
    if "id" in entry:
        where = f"{where} (id {entry['id']})"
    if "conversations" not in entry:
        raise UserError(f"{where}: conversations is missing")
    turns = tuple(parse_turns(entry["conversations"], where=where))
    # A row with both is an image row, as in LLaVA.
    field = "image" if entry.get("image") else "video"
    names = entry.get(field) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {field} must be a path or a list of paths")
    check_placeholders(turns, len(names), where=where)
    media = tuple(inside(root, name, where=where) for name in names)
    return Row(index, where, media, _parse_bounds(entry, where), turns)


def inside(root: str, name: str, *, where: str) -> str:
    """`root`/`name`. Raises UserError when `name` is absolute or climbs out of `root`."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts or ":" in path.parts[0]:
        raise UserError(f"{where}: media path {name!r} must be relative to media_root and stay inside it")
    return os.path.join(root, name)


def _parse_bounds(entry: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    """`start` and `end` of a row in seconds (VideoChat-Flash's fields for a part of a video)."""
    if entry.get("start") is None and entry.get("end") is None:
        return None
    start, end = entry.get("start"), entry.get("end")
    start = 0.0 if start is None else start
    end = float("inf") if end is None else end
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (start, end))
    if not numbers or not 0 <= start < end:
        raise UserError(f"{where}: start and end must be seconds with 0 <= start < end")
    return float(start), float(end)
