"""Members of tar files, read in place: a reference is "shard.tar::name" or "shard.tar::name@offset+length".

With the span written out no reader has to walk through the tar; the header before it is checked, so that a
tar that was made anew is noticed.
"""

import functools
import os
import re
import tarfile
from collections.abc import Iterator

from crosslmm_jax.errors import DataError

_SPAN = re.compile(r"(.+)@(\d+)\+(\d+)", re.DOTALL)
_BLOCK = 512
_KNOWN_TARS = 16  # tables of members that a process keeps


def is_tar(path: str) -> bool:
    """Whether the name is that of a tar, so that "::" after it leads to a member."""
    return path.endswith(".tar")


def tar_member(name: str, offset: int, length: int) -> str:
    """What stands after "::" in a reference to the member `name`, which lies at `offset`."""
    return f"{name}@{offset}+{length}"


def member_name(member: str) -> str:
    """The name in the tar, without the span."""
    match = _SPAN.fullmatch(member)
    return match[1] if match else member


def span_of(member: str) -> tuple[int, int] | None:
    """Offset and length that are written out after a name, if they are."""
    match = _SPAN.fullmatch(member)
    return (int(match[2]), int(match[3])) if match else None


def member_span(tar_path: str, member: str) -> tuple[int, int]:
    """Where a member's content lies in its tar: offset and length in bytes.

    Args:
        tar_path: an uncompressed tar.
        member: what stands after "::" in a reference.

    Raises:
        DataError: the tar cannot be read ("other", "corrupt"), holds no such file ("missing"), ends within
            it ("truncated"), or holds another one where the span points to ("changed").
    """
    match = _SPAN.fullmatch(member)
    if match is None:
        spans = _spans(tar_path, _mtime(tar_path))
        if member not in spans:
            raise DataError(tar_path, "missing", f"holds no file {member}; correct the annotation")
        return spans[member]
    name, offset, length = match[1], int(match[2]), int(match[3])
    if not _is_header_of(_read_block(tar_path, offset - _BLOCK), name, length):
        fix = "the tar has changed; index the data set again"
        raise DataError(tar_path, "changed", f"{name} does not lie at byte {offset}: {fix}")
    if offset + length > os.path.getsize(tar_path):
        raise DataError(tar_path, "truncated", f"ends within {name}; download the tar again")
    return offset, length


def _mtime(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError as error:
        raise DataError(path, "other", f"cannot be read ({error.strerror}); correct the path") from error


@functools.lru_cache(maxsize=_KNOWN_TARS)
def _spans(path: str, mtime: int) -> dict[str, tuple[int, int]]:
    """Offset and length of each file; `mtime` makes a table of a changed tar another one."""
    return {member.name: (member.offset_data, member.size) for _, member in walk_tar(path)}


def _read_block(path: str, offset: int) -> bytes:
    if offset < 0:
        return b""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(_BLOCK)
    except OSError as error:
        raise DataError(path, "other", f"cannot be read ({error.strerror}); correct the path") from error


def _is_header_of(block: bytes, name: str, length: int) -> bool:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    # A name that is long or not ASCII stands in a block of its own, and here only cut or with "?" in it.
    short = name.encode("ascii", "replace").decode()[:100]
    cut = name.encode("utf-8", "surrogateescape")[:100].decode("utf-8", "surrogateescape")
    return header.isreg() and header.size == length and header.name in (name, short, cut)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """What a small file of an open tar holds. Raises DataError when the tar ends within it."""
    try:
        content = tar.extractfile(member)
        return content.read() if content is not None else b""
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            str(tar.name), "truncated", f"ends within {member.name}; download the tar again"
        ) from error


def walk_tar(path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The tar and each of its files in order, while it is open.

    Raises:
        DataError: the tar cannot be read, or is damaged; at the place of the damage.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield tar, member
                tar.members = []  # type: ignore[attr-defined]  # or the tar remembers all that it has met
            end = tar.offset
    except (OSError, tarfile.TarError) as error:
        fix = "download it again, or unpack it if it is compressed"
        raise DataError(path, "corrupt", f"cannot be read as a tar ({error}); {fix}") from error
    # The iteration ends without an error at a header that is damaged, which zeros or the end of file are not.
    if any(_read_block(path, end)):
        raise DataError(path, "corrupt", f"is damaged at byte {end}; download the tar again")
