"""WebDataset tars: the files of one sample are neighbours and share the name before the first dot.

A sample is an image, several images or a video, with a .json that holds `conversations` as LLaVA writes them,
or with a caption in a .txt or in a field of the .json, as img2dataset and video2dataset write it.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping

from crosslmm_jax.data.annotations.json_files import files_of
from crosslmm_jax.data.annotations.options import text_option
from crosslmm_jax.data.annotations.rows import CAPTION_QUESTIONS, DatasetSpec, Entry, Origin, Row
from crosslmm_jax.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, kind_of, read_member, tar_member, walk_tar
from crosslmm_jax.errors import Fault, UserError

OPTIONS = frozenset({"caption", "question"})


@dataclasses.dataclass
class Sample:
    """The files of one sample.

    Attributes:
        tar: path of the tar.
        key: the name that they share.
        caption: field of the .json that holds the caption; "": the .txt, or else the field `caption`.
        question: asks for the caption; "": by the kind of the medium.
        media: references by kind, images and videos.
        texts: content of the .json and .txt, by suffix.
    """

    tar: str
    key: str
    caption: str
    question: str
    media: dict[str, list[str]] = dataclasses.field(default_factory=lambda: {"images": [], "videos": []})
    texts: dict[str, bytes] = dataclasses.field(default_factory=dict)


def entries(spec: DatasetSpec) -> Iterator[Entry]:
    """The samples, tar by tar; a Fault at the place where a tar is damaged.

    Options:
        caption: field of the .json that holds the caption.
        question: asks for the caption.

    Raises:
        UserError: an option is wrong.
    """
    caption, question = (text_option(spec, name, "") for name in ("caption", "question"))
    for tar in files_of(spec.path, ".tar"):
        try:
            kind_of(tar)
            for sample in _samples(tar, caption, question):
                yield Entry(f"{tar}: {sample.key}", sample)
        except UserError as error:
            detail = str(error).removeprefix(f"{tar}: ")
            yield Entry(tar, Fault(tar, "malformed", detail, os.path.basename(tar)))


def _samples(path: str, caption: str, question: str) -> Iterator[Sample]:
    sample = None
    for tar, member in walk_tar(path):
        folder, name = os.path.split(member.name)
        stem, _, suffix = name.partition(".")
        key = os.path.join(folder, stem)
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(path, key, caption, question)
        kind = "." + suffix.rpartition(".")[2].lower()
        if kind in (".json", ".txt"):
            sample.texts[kind[1:]] = read_member(tar, member)
        elif kind in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            media = sample.media["images" if kind in IMAGE_SUFFIXES else "videos"]
            place = tar_member(member.name, member.offset_data, member.size)
            media.append(f"{os.path.basename(path)}::{place}")
    if sample is not None:
        yield sample


def to_row(sample: Sample, origin: Origin) -> Row:
    """The row of one sample, its media relative to the folder of the tar."""
    root = os.path.dirname(sample.tar) or "."
    origin = dataclasses.replace(origin, spec=dataclasses.replace(origin.spec, root=root))
    about = _json_of(sample, origin)
    kinds = [kind for kind, names in sample.media.items() if names]
    if len(kinds) > 1:
        raise origin.error("malformed", "holds images and a video; put them into samples of their own")
    conversations = about.get("conversations")
    if conversations is None:
        if not kinds:
            raise origin.error("missing", "holds no image, no video and no conversations")
        question = sample.question or CAPTION_QUESTIONS[kinds[0]]
        conversations = origin.caption_turns(question, _caption_of(sample, about))
    bounds = origin.bounds(about.get("start"), about.get("end")) if sample.media["videos"] else None
    options = origin.media_options(about)
    return origin.make_row(conversations, bounds=bounds, options=options, **sample.media)


def _json_of(sample: Sample, origin: Origin) -> Mapping[str, object]:
    try:
        about = json.loads(sample.texts.get("json", b"{}"))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, Mapping):
        raise origin.error("malformed", "its .json is no valid JSON object")
    return about


def _caption_of(sample: Sample, about: Mapping[str, object]) -> object:
    if sample.caption or "txt" not in sample.texts:
        return about.get(sample.caption or "caption")
    return sample.texts["txt"].decode("utf-8", "replace")
