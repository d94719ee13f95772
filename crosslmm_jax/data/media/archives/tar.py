"""Members of tar files, read in place: a reference is "shard.tar::name" or "shard.tar::name@offset+length".

A reference with a span is read without walking through the tar. The member's header is checked, so that a
rewritten tar is noticed.
"""

import functools
import os
import re
import tarfile
from collections.abc import Iterator

from crosslmm_jax.errors import DataError

_SPAN = re.compile(r"(.+)@(\d+)\+(\d+)", re.DOTALL)
_BLOCK = 512
_KNOWN_TARS = 16  # tars whose member tables a process keeps


def is_tar(path: str) -> bool:
    """Whether the name is that of a tar, so that a member follows "::"."""
    return path.endswith(".tar")


def tar_member(name: str, offset: int, length: int) -> str:
    """The part after "::" of a reference to member `name`, whose content lies at `offset`."""
    return f"{name}@{offset}+{length}"


def member_name(member: str) -> str:
    """The name of a member, without its span."""
    match = _SPAN.fullmatch(member)
    return match[1] if match else member


def member_span(tar_path: str, member: str) -> tuple[int, int]:
    """Offset and length in bytes of a member's content in its tar.

    Args:
        tar_path: an uncompressed tar.
        member: the part after "::" of a reference.

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
    """Offset and length of each file. `mtime` is part of the cache key, for tars that change."""
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
    # The full form of a long or non-ASCII name lies in a block before. Here it is truncated or has "?".
    short = name.encode("ascii", "replace").decode()[:100]
    cut = name.encode("utf-8", "surrogateescape")[:100].decode("utf-8", "surrogateescape")
    return header.isreg() and header.size == length and header.name in (name, short, cut)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Content of a small file of an open tar. Raises DataError when the tar ends within it."""
    try:
        content = tar.extractfile(member)
        return content.read() if content is not None else b""
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            str(tar.name), "truncated", f"ends within {member.name}; download the tar again"
        ) from error


def walk_tar(path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yields the open tar and each of its files, in order.

    Raises:
        DataError: the tar cannot be read or, when iteration reaches the place, is damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield tar, member
                tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps every member in memory
            end = tar.offset
    except (OSError, tarfile.TarError) as error:
        fix = "download it again, or unpack it if it is compressed"
        raise DataError(path, "corrupt", f"cannot be read as a tar ({error}); {fix}") from error
    # tarfile stops without an error at a damaged header. Zeros and the end of the file are no damage.
    if any(_read_block(path, end)):
        raise DataError(path, "corrupt", f"is damaged at byte {end}; download the tar again")
