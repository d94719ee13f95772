"""TensorFlow Datasets stored as ArrayRecord, read without tensorflow: `path` is the folder of the data set.

The folder holds dataset_info.json and features.json. Records are tf.train.Examples; their media are encoded
images and videos, or paths of files. `crosslmm data to-tfds` writes such folders.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crosslmm_jax.data.annotations.json_files import read_json
from crosslmm_jax.data.annotations.options import map_option, text_option
from crosslmm_jax.data.annotations.rows import CAPTION_QUESTIONS, DatasetSpec, Entry, Origin, Row
from crosslmm_jax.data.media import (
    FRAMES_PREFIX,
    parse_example,
    read_record,
    resolve_path,
    suffix_by_content,
    value_member,
)
from crosslmm_jax.errors import DataError, UserError, first_line

OPTIONS = frozenset({"fields", "question", "split"})
# Field -> names of the feature that holds it, unless the option `fields` names another.
_FIELDS = {
    "conversations": ("conversations",),
    "question": ("question",),
    "answer": ("answer", "caption", "text"),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    # Names of the files in `images` or `videos`, for their suffixes; "frames/a.png" is a frame of a video.
    "media_names": ("media_names",),
    "media_files": ("media_files",),  # number of images of each medium; 1 for a file
    "start": ("start",),
    "end": ("end",),
    "stream": ("stream",),
    "folder_fps": ("folder_fps",),
    "video_read_type": ("video_read_type",),  # checked, without effect
}
_LONGEST_PATH = 4096


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which feature of a data set holds what.

    Attributes:
        fields: field -> feature, of the fields that the data set has.
        kinds: feature -> kind: image, video, text, tensor, ... as features.json names it.
        question: asks for the caption where no feature does; "": by the kind of the medium.
    """

    fields: Mapping[str, str]
    kinds: Mapping[str, str]
    question: str


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The records in order; each is read when its row is made.

    Options:
        fields: map of fields (the table in this module) to features; nested ones are "a/b".
        split: "train" by default; also "train[:10%]" or "train+test".
        question: asks for a caption.

    Raises:
        UserError: the folder holds no such data set, or an option is wrong.
    """
    files = _files(spec)
    layout = _layout(spec)
    for name, begin, end in files:
        for number in range(begin, end):
            yield Entry(f"{os.path.join(spec.path, name)}: record {number}", (layout, name, number))


def _files(spec: DatasetSpec) -> list[tuple[str, int, int]]:
    """Name in the folder, and first and last record (exclusive), of each file of the split, in order."""
    from tensorflow_datasets.core import dataset_info

    split = text_option(spec, "split", "train")
    path = os.path.join(spec.path, "dataset_info.json")
    if not os.path.isfile(path):
        inner = [
            name for name in _folders(spec.path) if os.path.isfile(f"{spec.path}/{name}/dataset_info.json")
        ]
        fix = f"name {os.path.join(spec.path, inner[-1])}" if inner else "name a folder that has one"
        raise UserError(f"{spec.path}: holds no dataset_info.json; {fix}")
    try:
        info = dataset_info.read_proto_from_builder_dir(spec.path)
    except Exception as error:  # of protobuf's JSON, of files, and tfds' own
        raise UserError(f"{path}: cannot be read ({first_line(error)}); write the data set again") from error
    if not dataset_info.supports_file_format(info, "array_record"):
        fix = "convert it with tfds.convert_format to array_record"
        raise UserError(f"{path}: is kept as {info.file_format or 'tfrecord'}, which needs tensorflow; {fix}")
    try:
        splits = dataset_info.get_split_dict_from_proto(info, spec.path, file_format="array_record")
        files = splits[split].file_instructions
    except (ValueError, KeyError, AssertionError) as error:
        known = ", ".join(sorted(entry.name for entry in info.splits))
        raise UserError(f"{spec.path}: options: split is {split!r}; the data set has {known}") from error
    return [(os.path.relpath(file.filename, spec.path), file.skip, file.skip + file.take) for file in files]


def _folders(path: str) -> list[str]:
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def _layout(spec: DatasetSpec) -> Layout:
    path = os.path.join(spec.path, "features.json")
    content = read_json(path)
    try:
        kinds = dict(_kinds(content, ""))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: is no description of features; write the data set again") from None
    given = map_option(spec, "fields", dict.fromkeys(_FIELDS, ""))
    fields = {}
    for field, names in _FIELDS.items():
        name = given[field] or next((name for name in names if _has(kinds, name)), None)
        if name is None:
            continue
        if not _has(kinds, name):
            known = ", ".join(sorted(kinds))
            raise UserError(f"{spec.path}: options: fields: {field} is {name!r}; the features are {known}")
        fields[field] = name
    if not fields.keys() & {"conversations", "answer"}:
        known = ", ".join(sorted(kinds))
        fix = f"name conversations or answer under options: fields, of the features {known}"
        raise UserError(f"{spec.path}: has no feature with a known name of a text; {fix}")
    return Layout(fields, kinds, text_option(spec, "question", ""))


def _kinds(node: Any, name: str) -> Iterator[tuple[str, str]]:
    """Name and kind of each feature below `node`, the name as in a record: "a/b" for b in a."""
    if "featuresDict" in node:
        for key, inner in node["featuresDict"].get("features", {}).items():
            yield from _kinds(inner, f"{name}/{key}" if name else key)
    elif "sequence" in node:
        yield from _kinds(node["sequence"]["feature"], name)
    else:
        (kind,) = node.keys() - {"pythonClassName", "description"}
        yield name, kind


def _has(kinds: Mapping[str, str], name: str) -> bool:
    return name in kinds or any(other.startswith(f"{name}/") for other in kinds)


def to_row(value: tuple[Layout, str, int], origin: Origin) -> Row:
    """The row of one record."""
    layout, name, number = value
    folder = origin.spec.path
    try:
        path = resolve_path(folder, name, allow_outside=origin.allow_outside)
        example = parse_example(read_record(path, number), f"{path}::{number}")
    except DataError as error:
        raise origin.error(error.fault.reason, str(error), name) from error
    record = _Record(layout, example, origin)
    allowed = {"image": ("images",), "video": ("videos",), "text": ()}
    kinds = allowed.get(origin.spec.media_type or "", ("images", "videos"))
    kind = next((kind for kind in kinds if any(record.values(kind))), "")
    media = [] if any(record.values("media_files")) else record.paths(kind)
    if not media and kind:
        media = [f"{name}::{member}" for member in record.members(kind, number)]
        origin = dataclasses.replace(origin, spec=dataclasses.replace(origin.spec, root=folder))
    bounds = origin.bounds(record.time("start"), record.time("end")) if kind == "videos" else None
    record.text("video_read_type")
    turns = record.turns(kind, len(media))
    options = origin.media_options({name: record.number(name) for name in ("stream", "folder_fps")})
    return origin.make_row(turns, bounds=bounds, options=options, **({kind: media} if kind else {}))


class _Record:
    """The values of one record, by field."""

    def __init__(self, layout: Layout, example: Mapping[str, Sequence[Any]], origin: Origin) -> None:
        self.layout, self.example, self.origin = layout, example, origin

    def values(self, field: str) -> Sequence[Any]:
        """Values of the field's feature; empty without such a feature."""
        return self.example.get(self.layout.fields.get(field, ""), ())

    def texts(self, feature: str) -> list[str]:
        """Values of a feature as text. Raises DataError when they are not text."""
        values = self.example.get(feature, ())
        try:
            return [value.decode() for value in values]
        except (AttributeError, UnicodeDecodeError):
            raise self.origin.error("malformed", f"{feature} is no text") from None

    def text(self, field: str) -> str:
        """The text of a field; "" without one."""
        return "".join(self.texts(self.layout.fields.get(field, ""))[:1])

    def time(self, field: str) -> object:
        """The time of a field: a number, a text, or None without one."""
        values = self.values(field)
        if not len(values) or values[0] == b"":
            return None
        return values[0] if isinstance(values[0], int | float) else self.text(field)

    def number(self, field: str) -> object:
        """The number of a field, which may be written as text; the text if it is none; None without one."""
        value = self.time(field)
        if not isinstance(value, str):
            return value
        with contextlib.suppress(ValueError):
            return int(value) if value.isdecimal() else float(value)
        return value

    def paths(self, field: str) -> list[str]:
        """The paths that a field holds; empty if it holds media. Raises DataError for numbers."""
        values = [value for value in self.values(field) if value]
        if not all(isinstance(value, bytes) for value in values):
            feature = self.layout.fields[field]
            raise self.origin.error("malformed", f"{feature} holds numbers; name one of media or paths")
        return [value.decode() for value in values] if all(map(_is_path, values)) else []

    def members(self, field: str, number: int) -> list[str]:
        """References to the media in a field of record `number`, without the name of the file."""
        feature = self.layout.fields[field]
        values = self.values(field)
        present = [place for place, value in enumerate(values) if value]
        names = self.texts(self.layout.fields.get("media_names", ""))
        media = []
        for first, last in self._groups(field, present, len(values)):
            name = names[first] if first < len(names) else ""
            suffix = os.path.splitext(name)[1]
            if not suffix.removeprefix(".").isalnum():
                suffix = suffix_by_content(values[first])
            pictures = last > first or (field == "videos" and name.startswith(FRAMES_PREFIX))
            media.append(value_member(number, feature, first, last, suffix, pictures=pictures))
        return media

    def _groups(self, field: str, present: list[int], count: int) -> list[tuple[int, int]]:
        """(first, last) of the values of each medium; several values are the frames of one video."""
        sizes = [int(size) for size in self.values("media_files")]
        if sizes:
            if sum(sizes) != count or min(sizes) < 1:
                raise self.origin.error("malformed", f"media_files {sizes} do not add up to {count} files")
            ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
            return [(end - size, end - 1) for end, size in zip(ends, sizes, strict=True)]
        kind = self.layout.kinds.get(self.layout.fields.get(field, ""))
        if field == "videos" and kind in ("image", "video") and present:
            return [(present[0], present[-1])]
        return [(place, place) for place in present]

    def turns(self, kind: str, num_media: int) -> object:
        """The conversation, in LLaVA or chat form, or built from question and answer."""
        name = self.layout.fields.get("conversations")
        if name is None:
            question = self.text("question") or self.layout.question or CAPTION_QUESTIONS.get(kind, "")
            if not question:
                raise self.origin.error("conversation", "has neither a medium nor a question")
            turns = self.origin.caption_turns(question, self.text("answer"))
            turns[0]["value"] = "\n".join(["<image>" * num_media, question]).strip()
            return turns
        for role, content in (("role", "content"), ("from", "value")):
            if f"{name}/{role}" in self.layout.kinds:
                pairs = zip(self.texts(f"{name}/{role}"), self.texts(f"{name}/{content}"), strict=False)
                return [{role: speaker, content: text} for speaker, text in pairs]
        try:
            return json.loads(self.text("conversations"))
        except (ValueError, RecursionError):
            raise self.origin.error("conversation", f"{name} is no JSON list of turns") from None


def _is_path(value: bytes) -> bool:
    """Whether a value is a path. Media hold bytes that no text has."""
    try:
        return len(value) <= _LONGEST_PATH and value.decode().isprintable()
    except UnicodeDecodeError:
        return False
