"""Rows of annotations, whatever format they come from, checked before anything is decoded."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from crosslmm_jax.data.text import Turn, check_placeholders, parse_turns, writable
from crosslmm_jax.errors import DataError, Fault, Reason

Modality = Literal["text", "image", "multi_image", "video"]
MODALITIES: tuple[Modality, ...] = (
    "text",
    "image",
    "multi_image",
    "video",
)  # an index holds the position here
MediaType = Literal["image", "video", "text", "mix"]
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d{1,2}(?:\.\d*)?)")  # [hours:]minutes:seconds
_ELSEWHERE = re.compile(r"[A-Za-z]:|.*:$")  # a drive, or the scheme of an address


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """One data set of a mixture.

    Attributes:
        name: unique within the mixture; seeds the random strategy.
        path: file, folder or pattern of the annotations, absolute or relative to the working folder.
        format: a key of `crosslmm_jax.data.annotations.formats.FORMATS`.
        root: folder that the media paths are relative to.
        strategy: which rows; see `crosslmm_jax.data.annotations.strategies`.
        media_type: which field of a row counts; None and "mix" let each row tell.
        read_type: VideoChat-Flash's `video_read_type`, for all rows that bring none.
        weight: how often its rows are drawn, relative to the other data sets of the mixture.
        options: settings of the format, e.g. the field map.
    """

    name: str
    path: str
    format: str
    root: str
    strategy: str = "all"
    media_type: MediaType | None = None
    read_type: str | None = None
    weight: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One training row, still text.

    Attributes:
        where: file, row and id, for messages.
        dataset: name of the data set it came from.
        row: its number in that data set, bad rows counted.
        modality: what its media are.
        media: references of its images or videos, relative to `root`; a row of text has none.
        root: folder of the media.
        bounds: seconds (start, end) of the part of the video to read, or None for all.
        turns: the conversation.
        read_type: VideoChat-Flash's `video_read_type`, e.g. "gif" or "img".
    """

    where: str
    dataset: str
    row: int
    modality: Modality
    media: tuple[str, ...]
    root: str
    bounds: tuple[float, float] | None
    turns: tuple[Turn, ...]
    read_type: str | None = None

    def fault(self, cause: Fault) -> Fault:
        """`cause`, met in the conversation or in a medium of this row, as a fault of the row."""
        detail = cause.detail if cause.where == self.where else str(cause)
        return Fault(self.where, cause.reason, detail, cause.path, self.dataset, self.row)


class Entry(NamedTuple):
    """One entry of a data set before it is checked: `value` is what its format makes of it.

    A format that cannot read an entry at all puts a Fault in its place.
    """

    where: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row comes from, and what holds for all rows of its data set."""

    where: str
    row: int
    spec: DatasetSpec
    allow_outside: bool = False

    def error(self, reason: Reason, detail: str, path: str = "") -> DataError:
        """The error to raise when this row cannot be used."""
        return DataError(self.where, reason, detail, path)


def make_row(
    origin: Origin,
    conversations: Any,
    *,
    images: Sequence[str] = (),
    videos: Sequence[str] = (),
    bounds: tuple[float, float] | None = None,
    read_type: str | None = None,
) -> Row:
    """A checked row.

    Args:
        origin: of the row.
        conversations: turns as LLaVA or chat objects.
        images: their references; at most one of `images` and `videos` is given.
        videos: likewise.
        bounds: seconds of the videos to read.
        read_type: of this row; the data set's by default.

    Raises:
        DataError: malformed turns, placeholders that do not fit the media, or a path that leaves the root.
    """
    turns = tuple(parse_turns(conversations, where=origin.where))
    names = images or videos
    check_placeholders(turns, len(names), where=origin.where)
    media = tuple(inside(origin, name) for name in names)
    modality: Modality = "text"
    if media:
        moving = bool(videos) or any(name.lower().endswith(".gif") for name in media)
        modality = "video" if moving else "multi_image" if len(media) > 1 else "image"
    return Row(
        where=origin.where, dataset=origin.spec.name, row=origin.row, modality=modality, media=media,
        root=origin.spec.root, bounds=bounds, turns=turns, read_type=read_type or origin.spec.read_type,
    )  # fmt: skip


def caption_turns(origin: Origin, question: str, caption: Any) -> list[dict[str, str]]:
    """The conversation about one medium with a caption. Raises DataError when that is empty or no text."""
    if not isinstance(caption, str) or not caption.strip():
        raise origin.error("conversation", "its caption is empty or no text")
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": caption.strip()}]


def inside(origin: Origin, name: Any) -> str:
    """`name` as a reference relative to the root. Raises DataError when it lies elsewhere and may not.

    Of "shard.tar::key.mp4" only the file's path can leave the root. Links are followed when a file is opened.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise origin.error("malformed", f"media path {name!r} must be a text that is not empty")
    if writable(name) != name:
        raise origin.error("malformed", f"media path {name!r} is no valid text; rename the file", name)
    file, mark, member = name.partition("::")
    root = os.path.abspath(origin.spec.root)
    if os.path.isabs(file) and not origin.allow_outside:
        # LLaVA's os.path.join lets absolute paths win, so some annotations write them out.
        relative = os.path.relpath(os.path.normpath(file), root)
        file = relative if relative != "." else ""
    path = PurePosixPath(file.replace("\\", "/"))
    if not path.parts or (
        not origin.allow_outside and (".." in path.parts or _ELSEWHERE.match(path.parts[0]))
    ):
        detail = f"media path {name!r} must be relative to media_root and stay inside it"
        raise origin.error("outside_root", detail, name)
    return file + mark + member


def parse_seconds(value: Any) -> float:
    """Seconds of a number, a number as text, or a clock time "[HH:]MM:SS[.mmm]".

    Raises:
        ValueError: `value` is none of them, negative, not finite or too large.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    clock = _CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
    if clock is None:
        try:
            seconds = float(value)
        except OverflowError:  # of an integer of hundreds of digits
            raise ValueError(value) from None
    else:
        hours, minutes, rest = (float(part or 0) for part in clock.groups())  # inf where too large
        if rest >= 60 or (clock[1] and minutes >= 60):
            raise ValueError(value)
        seconds = hours * 3600 + minutes * 60 + rest
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(value)
    return seconds


def parse_bounds(origin: Origin, start: Any, end: Any) -> tuple[float, float] | None:
    """Start and end of the part of a video to read; a missing one is the video's own, None if both are.

    Raises:
        DataError: a time is no time, or they are not in order.
    """
    if start is None and end is None:
        return None
    try:
        first = 0.0 if start is None else parse_seconds(start)
        last = math.inf if end is None else parse_seconds(end)
        if not first < last:
            raise ValueError(start, end)
    except ValueError:
        detail = f"start {start!r} and end {end!r} are no times with 0 <= start < end; seconds or HH:MM:SS"
        raise origin.error("clip_times", detail) from None
    return first, last
