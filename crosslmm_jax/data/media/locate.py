"""Finds the media that annotations name, keeps them within their root, and limits how long reading may stall.

A medium is a file, a folder of pictures, a part of a file (a member of a tar) or bytes (of a record). Nothing
here decodes. Files are checked before they are opened, because opening a pipe or a device can block.
"""

import io
import os
import stat
import time
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from crosslmm_jax.config import DataConfig
from crosslmm_jax.data.media.archives import (
    is_parquet,
    is_record_file,
    is_tar,
    member_name,
    member_span,
    read_cell,
    read_values,
    tar_member,
)
from crosslmm_jax.data.media.content import (
    HEAD_BYTES,
    is_mp4,
    is_video,
    picture_suffix,
    suffix_by_content,
)
from crosslmm_jax.errors import DataError

MAX_PIXELS = 2**27  # per frame; 16k video has 2**27
FOLDER_FPS = 1.0  # of a folder of pictures whose annotation says no rate
DEADLINE_S = DataConfig.deadline_s  # the default of every reader


class MediaOptions(NamedTuple):
    """What an annotation says about the reading of its media.

    Attributes:
        stream: number of the video stream in its file, as ffprobe counts; None: the one that players show.
        folder_fps: pictures per second of a folder of pictures; None: FOLDER_FPS.
    """

    stream: int | None = None
    folder_fps: float | None = None


class Media(NamedTuple):
    """One medium that is not just a path.

    Attributes:
        path: the file or folder on disk.
        name: name of the medium in the file, for messages and the suffix; "" for the whole file.
        offset: byte at which the medium begins.
        length: bytes of the medium; None for the whole file.
        data: the content, when the file does not hold it verbatim.
        pictures: the frames of a video that is stored as pictures. `path` and `name` are then for messages.
        options: how it is read.
        damaged: number of damaged frames of a video as counted earlier, e.g. by an index; None: not counted.
    """

    path: str
    name: str = ""
    offset: int = 0
    length: int | None = None
    data: bytes | None = None
    pictures: tuple["Media", ...] = ()
    options: MediaOptions = MediaOptions()
    damaged: int | None = None

    def __str__(self) -> str:
        return f"{self.path}::{self.name}" if self.name else self.path


PathOrMedia = str | os.PathLike[str] | Media


def open_media(
    root: str, reference: str, options: MediaOptions = MediaOptions(), *, allow_outside: bool = False
) -> Media:
    """The medium of a reference: a path, "a.tar::b.mp4", "a.array_record::17" or "a.parquet::17/image".

    In a tar the header of the member is read; in an ArrayRecord file, the whole record; in a Parquet file,
    the column of the whole row group.

    Args:
        root: folder of the media; may be a symbolic link.
        reference: as in the annotation.
        options: how it is read, as the annotation says.
        allow_outside: accept absolute paths, "..", and links that lead out of `root`.

    Raises:
        DataError: it lies outside `root`, there is no such member, or its file is damaged.
    """
    file, member = split_reference(reference)
    if member is None:
        path = resolve_path(root, reference, allow_outside=allow_outside)
        if not allow_outside and os.path.isdir(path):
            _check_links(root, path)
        return Media(path, options=options)
    path = resolve_path(root, file, allow_outside=allow_outside)
    if kind_of(path) == "folder":
        raise DataError(path, "not_a_file", "is a folder; give the path of a file")
    if is_record_file(file):
        return _medium_of(path, member, *read_values(path, member))._replace(options=options)
    if is_parquet(file):
        return _medium_of(path, member, [read_cell(path, member)], "", False)._replace(options=options)
    offset, length = member_span(path, member)
    return Media(path, member_name(member), offset, length, options=options)


def folder_rate(source: PathOrMedia) -> float:
    """Pictures per second of a folder of pictures."""
    return options_of(source).folder_fps or FOLDER_FPS


def options_of(source: PathOrMedia) -> MediaOptions:
    """How a medium is read; of a path, the defaults."""
    return source.options if isinstance(source, Media) else MediaOptions()


def from_bytes(data: bytes) -> Media:
    """The content of a picture or video file as a medium. Raises DataError ("empty") where there is none."""
    if not data:
        raise DataError("bytes", "empty", "cannot be decoded (holds no bytes); send the whole file")
    return Media("bytes", f"medium{suffix_by_content(data)}", data=data)


def split_reference(reference: str) -> tuple[str, str | None]:
    """The file of a reference, and the member in it or None. A file's name may contain "::" too."""
    file, mark, member = reference.partition("::")
    holds_members = is_tar(file) or is_record_file(file) or is_parquet(file)
    return (file, member) if mark and holds_members else (reference, None)


def _medium_of(path: str, member: str, values: list[bytes], suffix: str, in_folder: bool) -> Media:
    """The medium made of `values` of a record: a file, or a video stored as one or more pictures."""
    if not suffix:
        member += suffix_by_content(values[0])
    if not in_folder:
        return Media(path, member, data=values[0])
    pictures = (Media(path, f"{member}#{place}{suffix}", data=value) for place, value in enumerate(values))
    return Media(path, member, pictures=tuple(pictures))


def _check_links(root: str, folder: str) -> None:
    """Raises DataError ("outside_root") when a link in a folder of pictures leads out of `root`."""
    with os.scandir(folder) as entries:
        links = [entry.path for entry in entries if entry.is_symlink()]
    for path in links:
        resolve_path(root, os.path.relpath(path, root))


def direct_reference(reference: str, medium: Media) -> str:
    """`reference` with the span of its member written out, so that no reader has to search for it again."""
    if medium.length is None:
        return reference
    return f"{reference.partition('::')[0]}::{tar_member(medium.name, medium.offset, medium.length)}"


def open_file(source: PathOrMedia) -> BinaryIO:
    """The content of a medium as a file for reading and seeking."""
    if not isinstance(source, Media):
        return open(source, "rb")
    if source.data is not None:
        return io.BytesIO(source.data)
    if source.length is None:
        return open(source.path, "rb")
    return io.BufferedReader(_FileSlice(source.path, source.offset, source.length))


def head_of(source: PathOrMedia) -> bytes:
    """The first bytes of a medium that is no folder, as `content` needs them."""
    with open_file(source) as file:
        return file.read(HEAD_BYTES)


class _FileSlice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: str, offset: int, length: int) -> None:
        self._file = -1
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._offset, self._length, self._position = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: "memoryview | bytearray", /) -> int:  # type: ignore[override]
        room = max(0, min(len(buffer), self._length - self._position))
        count = os.preadv(self._file, [memoryview(buffer)[:room]], self._offset + self._position)
        self._position += count
        return count

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        super().close()


def suffix_of(source: PathOrMedia) -> str:
    """The suffix of a medium's name in lower case: ".mp4"."""
    name = (source.name or source.path) if isinstance(source, Media) else source
    return Path(name).suffix.lower()


def whole_file(source: PathOrMedia) -> str | None:
    """The path of a medium that is a whole file or folder; None for a part of a file."""
    if not isinstance(source, Media):
        return os.fspath(source)
    return source.path if source.data is None and source.length is None else None


def size_of(source: PathOrMedia) -> int:
    """Bytes of a medium that is not a folder."""
    if isinstance(source, Media):
        if source.data is not None:
            return len(source.data)
        if source.length is not None:
            return source.length
        return os.path.getsize(source.path)
    return os.path.getsize(source)


def stamp_of(source: PathOrMedia) -> tuple[int, int] | None:
    """Bytes and time of change (ns) of a file or folder, which another one in its place has not.

    None of a medium in memory, and of what is not there.
    """
    if isinstance(source, Media):
        if source.data is not None or source.pictures:
            return None
        source = source.path
    try:
        found = os.stat(source)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


class Deadline:
    """Limits the time until the next packet or picture of a file. Each one read restarts the clock."""

    def __init__(self, path: PathOrMedia, seconds: float | None) -> None:
        """Allows `seconds` from now and from each `check`; None for no limit."""
        self.path = path
        self.seconds = seconds
        self._last = time.monotonic()

    def check(self) -> None:
        """Restarts the clock. Raises DataError ("timeout") when reading stalled for too long."""
        now = time.monotonic()
        if self.seconds is not None and now - self._last > self.seconds:
            raise self.error()
        self._last = now

    def error(self) -> DataError:
        """The error for a file from which nothing was read in time."""
        fix = "fetch or convert it again, or raise deadline_s"
        return DataError(self.path, "timeout", f"gave nothing new for {self.seconds:g} seconds; {fix}")


def resolve_path(root: str, reference: str, *, allow_outside: bool = False) -> str:
    """The path of a file or folder that an annotation names relative to the media root.

    Args:
        root: folder of the media; may be a symbolic link.
        reference: as in the annotation, without a member of an archive.
        allow_outside: take absolute paths, "..", and links that lead out of `root`.

    Raises:
        DataError: "outside_root" when the path leaves `root`, "missing" when the reference is no path.
    """
    if not reference or "\0" in reference:
        raise DataError(root, "missing", f"{reference!r} is not the name of a file; correct the annotation")
    path = os.path.join(root, reference)
    if allow_outside:
        return path
    if os.path.isabs(reference) or ".." in reference.replace("\\", "/").split("/"):
        raise DataError(
            reference, "outside_root", f"leads out of the media root {root}; name it relative to it"
        )
    real_root = os.path.realpath(root)
    if os.path.commonpath([real_root, os.path.realpath(path)]) != real_root:
        raise DataError(path, "outside_root", "a link that leads out of the media root; copy the file there")
    return path


def kind_of(path: PathOrMedia) -> Literal["file", "folder"]:
    """What lies at `path`, without opening it. Links are followed.

    A part of a file counts as a file, pictures of a record as a folder.

    Raises:
        DataError: "missing", "empty", or "not_a_file" for pipes, sockets and devices.
    """
    if isinstance(path, Media) and path.data:
        return "file"
    try:
        found = os.stat(path.path if isinstance(path, Media) else path)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise DataError(path, "missing", "no such file; give the path of a picture or video") from error
    except OSError as error:
        raise DataError(
            path, "other", f"cannot be reached ({error.strerror}); correct its name or permissions"
        ) from error
    if stat.S_ISDIR(found.st_mode) or (isinstance(path, Media) and path.pictures):
        return "folder"
    if not stat.S_ISREG(found.st_mode):
        raise DataError(path, "not_a_file", "is a pipe, a socket or a device; give a regular file")
    if size_of(path) == 0:
        raise DataError(path, "empty", "cannot be decoded (holds no bytes); fetch it again")
    return "file"


def unreadable_reason(
    path: PathOrMedia, kind: Literal["picture", "video"]
) -> Literal["truncated", "corrupt", "wrong_type"]:
    """Why no reader can read a file, by its first bytes."""
    head = head_of(path)
    if kind == "picture":
        return "corrupt" if picture_suffix(head) else "wrong_type"
    if is_mp4(head):
        return "truncated"  # its table of frames is often at the end
    return "corrupt" if is_video(head) or picture_suffix(head) == ".gif" else "wrong_type"


def check_pixels(path: PathOrMedia, width: int, height: int) -> None:
    """Raises DataError ("too_large") for pictures that would fill memory."""
    if width * height > MAX_PIXELS:
        raise DataError(
            path, "too_large", f"frames of {width} x {height} are too large to read; make them smaller"
        )
