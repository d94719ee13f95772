"""A folder of pictures, read as a video."""

import os
import re
from collections.abc import Sequence

from crosslmm_jax.data.media.decoding import FrameStore
from crosslmm_jax.data.media.image import VIDEO_SUFFIXES, Resampling, is_image, read_image
from crosslmm_jax.data.media.locate import Deadline, Media, PathOrMedia
from crosslmm_jax.errors import DataError


def list_pictures(folder: PathOrMedia) -> list[PathOrMedia]:
    """The pictures in a folder, sorted by name. Numbers in names sort by value: 2 before 10.

    Raises:
        DataError: there are none ("empty"), or a video lies among them ("wrong_type").
    """
    if isinstance(folder, Media):
        if folder.pictures:
            return list(folder.pictures)
        folder = folder.path
    with os.scandir(folder) as entries:
        found = [entry.name for entry in entries if not entry.name.startswith(".")]
    names = list(filter(is_image, found))
    videos = sorted(name for name in found if name.lower().endswith(VIDEO_SUFFIXES))
    if videos:  # with a cover beside it, or subtitles
        detail = f"is a folder that holds the video {videos[0]}; name that file, or move it out of its frames"
        raise DataError(folder, "wrong_type", detail)
    if not names:
        raise DataError(folder, "empty", "is a folder that holds no pictures; give a video or its frames")
    names.sort(key=_by_value)
    return [os.path.join(folder, name) for name in names]


def _by_value(name: str) -> tuple[list[tuple[str, int]], str]:
    """Sort key of a name: its words and numbers, alternating."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", name)
    return [(word, int(number or -1)) for word, number in parts], name


def read_pictures(
    pictures: Sequence[PathOrMedia], store: FrameStore, *, resampling: Resampling, deadline: Deadline
) -> None:  # fmt: skip
    """Stores the pictures. Raises DataError when one is damaged."""
    for number, path in enumerate(pictures):
        deadline.check()
        store.put(number, number + 1, read_image(path, store.size, resampling).frames[0])
