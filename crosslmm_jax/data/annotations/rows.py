"""Rows of annotations, whatever their format, checked before any medium is opened."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeGuard

from crosslmm_jax.data.media import MediaOptions
from crosslmm_jax.data.text import Turn, check_placeholders, parse_turns, writable
from crosslmm_jax.errors import DataError, Fault, Reason

Modality = Literal["text", "image", "multi_image", "video"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "multi_image", "video")
# What asks for the caption of a medium, where neither the row nor the mixture has a question.
CAPTION_QUESTIONS = {"images": "Describe the image briefly.", "videos": "Describe the video briefly."}
LONG_CAPTION_QUESTION = "Describe the video in detail."  # the same for a long caption of a video
TVQA_FPS = 3.0  # pictures per second at which TVQA publishes its frames
MediaType = Literal["image", "video", "text", "mix"]
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d{1,2}(?:\.\d*)?)")  # [hours:]minutes:seconds
_ELSEWHERE = re.compile(r"[A-Za-z]:[/\\]|[A-Za-z][\w+.-]+://")  # a drive of Windows, or the scheme of a URL


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """One data set of a mixture.

    Attributes:
        name: unique within the mixture; seeds the random strategy.
        path: file, folder or glob pattern of the annotations, absolute or relative to the working folder.
        format: a key of `crosslmm_jax.data.annotations.formats.FORMATS`.
        root: folder that the media paths are relative to.
        strategy: which rows are used; see `crosslmm_jax.data.annotations.strategies`.
        media_type: which field of a row names its media; None and "mix": decided per row.
        weight: how often its rows are drawn, relative to the other data sets of the mixture.
        folder_fps: pictures per second of its folders of pictures, unless a row says another rate.
        options: settings of the format, e.g. names of fields.
    """

    name: str
    path: str
    format: str
    root: str
    strategy: str = "all"
    media_type: MediaType | None = None
    weight: float = 1.0
    folder_fps: float | None = None
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One training row: its conversation as text, its media as paths.

    Attributes:
        where: file, row number and id, for messages.
        dataset: name of its data set.
        row: number of the row in its data set, bad rows counted.
        modality: kind of its media.
        media: paths of its images or videos relative to `root`, or "shard.tar::member"; none for text.
        root: folder of the media.
        bounds: seconds (start, end) of the part of the video to read; None: all of it.
        turns: the conversation.
        media_options: how its media are read.
    """

    where: str
    dataset: str
    row: int
    modality: Modality
    media: tuple[str, ...]
    root: str
    bounds: tuple[float, float] | None
    turns: tuple[Turn, ...]
    media_options: MediaOptions = MediaOptions()

    def fault(self, cause: Fault) -> Fault:
        """`cause`, met in the conversation or in a medium of this row, as a fault of the row."""
        detail = cause.detail if cause.where == self.where else str(cause)
        return Fault(self.where, cause.reason, detail, cause.path, self.dataset, self.row)


class Entry(NamedTuple):
    """One row as a format reads it, before it is checked.

    Attributes:
        where: file and row, for messages.
        value: what the format's `to_row` takes; a Fault where the entry cannot be read at all.
    """

    where: str
    value: object


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row comes from, and the checks that turn what it says into a `Row`.

    Attributes:
        where: file and row, for messages.
        row: number of the row in its data set.
        spec: its data set.
        allow_outside: media paths may leave the media root.
    """

    where: str
    row: int
    spec: DatasetSpec
    allow_outside: bool = False

    def error(self, reason: Reason, detail: str, path: str = "") -> DataError:
        """The error to raise when this row cannot be used."""
        return DataError(self.where, reason, detail, path)

    def make_row(
        self,
        conversations: object,
        *,
        images: Sequence[str] = (),
        videos: Sequence[str] = (),
        bounds: tuple[float, float] | None = None,
        options: MediaOptions | None = None,
    ) -> Row:
        """Checks and builds a row.

        Args:
            conversations: list of turns, as LLaVA (`from`, `value`) or chat (`role`, `content`) objects.
            images: paths of its images; at most one of `images` and `videos` is given.
            videos: paths of its videos.
            bounds: seconds (start, end) of the videos to read.
            options: what `media_options` found in the row; None: it has no such fields.

        Raises:
            DataError: malformed turns, not one placeholder per medium, a path that leaves the root, or the
                stream of a row without videos.
        """
        turns = tuple(parse_turns(conversations, where=self.where))
        names = images or videos
        check_placeholders(turns, len(names), where=self.where)
        media = tuple(self.media_path(name) for name in names)
        modality: Modality = "text"
        if media:
            moving = bool(videos) or any(name.lower().endswith(".gif") for name in media)
            modality = "video" if moving else "multi_image" if len(media) > 1 else "image"
        options = options or self.media_options({})
        if options.folder_fps is None and any(map(is_tvqa, media)):
            options = options._replace(folder_fps=TVQA_FPS)
        if options.stream is not None and modality != "video":
            raise self.error("malformed", "stream is that of a video, and the row has none; leave it out")
        return Row(
            where=self.where, dataset=self.spec.name, row=self.row, modality=modality, media=media,
            root=self.spec.root, bounds=bounds, turns=turns, media_options=options,
        )  # fmt: skip

    def caption_turns(self, question: str, caption: object) -> list[dict[str, str]]:
        """The turns that ask for a caption and give it. Raises DataError when it is empty or no text."""
        if not isinstance(caption, str) or not caption.strip():
            raise self.error("conversation", "its caption is empty or no text")
        return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": caption.strip()}]

    def media_options(self, value: Mapping[str, object]) -> MediaOptions:
        """Reads `stream` and `folder_fps` of a row. `video_read_type` has no effect: files tell their kind.

        Raises:
            DataError: one of them is of the wrong type.
        """
        read_type = value.get("video_read_type")
        if read_type is not None and (not isinstance(read_type, str) or writable(read_type) != read_type):
            raise self.error("malformed", "video_read_type must be text")
        stream, rate = value.get("stream"), value.get("folder_fps")
        if stream is not None and not is_stream(stream):
            detail = f"stream is {stream!r}; write the number that ffprobe gives the stream"
            raise self.error("malformed", detail)
        if rate is not None and not is_rate(rate):
            detail = f"folder_fps is {rate!r}; write a number of pictures per second above 0"
            raise self.error("malformed", detail)
        if rate is None:
            rate = self.spec.folder_fps
        return MediaOptions(stream, None if rate is None else float(rate))

    def media_path(self, name: object) -> str:
        """The media path `name`, relative to the root.

        Links are followed later, when the file is opened.

        Raises:
            DataError: it is no text, or leads out of the root, without `allow_outside`. Of
                "shard.tar::key.mp4" only the path of the tar can.
        """
        if not isinstance(name, str) or not name or "\0" in name:
            raise self.error("malformed", f"media path {name!r} must be a text that is not empty")
        if writable(name) != name:
            raise self.error("malformed", f"media path {name!r} is no valid text; rename the file", name)
        file, mark, member = name.partition("::")
        if not self.allow_outside and os.path.isabs(file):
            # LLaVA's os.path.join lets absolute paths win, so some annotations write them out.
            relative = os.path.relpath(os.path.normpath(file), os.path.abspath(self.spec.root))
            file = relative if relative != "." else ""
        parts = file.replace("\\", "/").split("/")
        nowhere = all(part in ("", ".") for part in parts) and not file.startswith(("/", "\\"))
        if nowhere or (not self.allow_outside and (".." in parts or _ELSEWHERE.match(file))):
            fault, fix = "is not below data_root", "write it relative to data_root, or move the media there"
            if "://" in name:
                fault, fix = "is an address", "download the file and write its path relative to data_root"
            raise self.error("outside_root", f"media path {name!r} {fault}; {fix}", name)
        return file + mark + member

    def bounds(self, start: object, end: object) -> tuple[float, float] | None:
        """Reads (start, end) in seconds; a missing one is that of the video, None when both are missing.

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
            fix = "seconds or HH:MM:SS"
            detail = f"start {start!r} and end {end!r} are no times with 0 <= start < end; {fix}"
            raise self.error("clip_times", detail) from None
        return first, last


def is_tvqa(name: str) -> bool:
    """Whether a path is that of TVQA's frames or rows: annotations that use them say no rate."""
    return "tvqa" in name.lower()


def is_stream(value: object) -> TypeGuard[int]:
    """Whether a value is the number of a stream of a file."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def is_rate(value: object) -> TypeGuard[float]:
    """Whether a value is a rate of pictures per second."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.001 <= value <= 1000


def parse_seconds(value: object) -> float:
    """Reads seconds from a number, a number as text, or a clock time "[HH:]MM:SS[.mmm]".

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
