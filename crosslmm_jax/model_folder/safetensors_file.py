"""Reads and writes safetensors files one tensor, or one layer of a stacked tensor, at a time.

Whole rows of tensors are read and written by position instead of mapping the file, because a mapped file
counts as resident memory. The library's `save_file` wants all tensors of a file at once.
"""

import dataclasses
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import cannot_read

_LARGEST_HEADER = 100 * 2**20  # the library's own limit
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # from a file system that cannot reserve space
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOATS = tuple(_NAMES)  # types that weights may have
Shape = tuple[int, ...]
_OTHERS = {"float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
           "bool": "BOOL"}  # fmt: skip
# Types of the format that no weights here have: 8 bits and fewer, unsigned and complex numbers.
_UNREAD = (
    "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "I4", "U4",
    "U16", "U32", "U64", "C64", "C128",
)  # fmt: skip
_DTYPES = {code: name for name, code in (_NAMES | _OTHERS).items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    shape: Shape
    dtype: str  # numpy's name
    begin: int  # of its bytes, from the start of the file

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, in the order of their bytes.

    Raises:
      UserError: the file cannot be read, is truncated or is no safetensors file, or its tensors overlap or
        leave gaps.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"its {size} bytes are fewer than its header says")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        _check_types(header, path)
        entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
        ordered = dict(sorted(entries.items(), key=_place_of))
        end = _end_of(ordered, 8 + length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise cannot_read(
            path, f"is no whole safetensors file ({error}); copy or download it again"
        ) from error
    if end != size:
        raise UserError(
            f"{path}: has {size} bytes instead of {end}; it is truncated or damaged: copy it again"
        )
    return ordered


def _check_types(header: Mapping[str, Mapping], path: Path) -> None:
    """Raises a `UserError` for types of the format that are not read here. Such a file is not damaged."""
    found = {name: value["dtype"] for name, value in header.items() if value["dtype"] in _UNREAD}
    if found:
        name = next(iter(found))
        raise UserError(
            f"{path}: {len(found)} tensor(s), such as {name}, have the type {found[name]}, which this project"
            f" does not read; give the checkpoint in {', '.join(FLOATS)} that it was made from"
        )


def _place_of(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].begin, item[1].nbytes  # an empty tensor comes before the one that begins at the same byte


def _end_of(ordered: Mapping[str, Entry], start: int) -> int:
    """Where the last tensor ends. Raises a `ValueError` unless each begins where the one before it ends."""
    end, before = start, "the header"
    for name, entry in ordered.items():
        if entry.begin != end:
            what = "overlaps" if entry.begin < end else "leaves a gap after"
            raise ValueError(f"{name} {what} {before}")
        end, before = end + entry.nbytes, name
    return end


def _entry(name: str, value: Mapping, start: int) -> Entry:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name} has the type {dtype}")
    # bool is an int, and a product of two negative sizes is positive.
    if not isinstance(shape, list) or not all(type(x) is int and x >= 0 for x in (*shape, begin, end)):
        raise ValueError(f"{name} has a shape or an offset that is no size")
    entry = Entry(tuple(shape), _DTYPES[dtype], start + begin)
    if end - begin != entry.nbytes:
        raise ValueError(f"the bytes of {name} do not fit its shape")
    return entry


def _bytes(value: np.ndarray) -> memoryview:
    """The bytes of a contiguous array without a copy. memoryview itself does not know bfloat16."""
    return memoryview(value.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


class Reader:
    """One open file."""

    def __init__(self, path: Path) -> None:
        """Reads the header. Raises a `UserError` as `read_header` does."""
        self.path = path
        self.entries = read_header(path)
        self._file = path.open("rb", buffering=0)

    def read(self, name: str, row: int | None = None) -> np.ndarray:
        """The tensor `name`, or its part `row` along the first axis."""
        entry = self.entries[name]
        if row is None:
            return self.read_part(name, tuple(slice(0, size) for size in entry.shape))
        rest = tuple(slice(0, size) for size in entry.shape[1:])
        return self.read_part(name, (slice(row, row + 1), *rest))[0]

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of the tensor `name` at `index`, one slice per axis. Nothing else is read."""
        entry = self.entries[name]
        bounds = zip(index, entry.shape, strict=True)
        value = np.empty([len(range(size)[part]) for part, size in bounds], jnp.dtype(entry.dtype))
        self.read_into(value, name, index)
        return value

    def read_into(self, out: np.ndarray, name: str, index: tuple[slice, ...]) -> None:
        """Reads the part of the tensor `name` at `index` into `out`, cast to its dtype.

        Several threads may read at once.

        Args:
          out: contiguous, of the shape of the part.
          name: the tensor.
          index: one slice per axis, without steps.

        Raises:
          UserError: the file has become shorter.
        """
        entry = self.entries[name]
        dtype = jnp.dtype(entry.dtype)
        bounds = [part.indices(size) for part, size in zip(index, entry.shape, strict=True)]
        whole = [bound == (0, size, 1) for bound, size in zip(bounds, entry.shape, strict=True)]
        if all(whole[1:]):  # one run of bytes
            row_bytes = math.prod(entry.shape[1:]) * dtype.itemsize
            begin = entry.begin + (bounds[0][0] * row_bytes if bounds else 0)
            value = out if out.dtype == dtype else np.empty(out.shape, dtype)
            self._read_bytes(_bytes(value), begin, name)
            if value is not out:
                np.copyto(out, value, casting="unsafe")
            return
        if os.fstat(self._file.fileno()).st_size < entry.begin + entry.nbytes:
            raise self._ended_inside(name)
        # Mapped, because a slice of an inner axis is many short runs of bytes. numpy copies integers faster
        # than bfloat16, and without holding up other threads.
        mapped = np.memmap(self._file, f"u{dtype.itemsize}", "r", entry.begin, entry.shape)[index]
        if out.dtype == dtype:
            np.copyto(out.view(mapped.dtype), mapped)
        else:
            np.copyto(out, np.ascontiguousarray(mapped).view(dtype), casting="unsafe")

    def _read_bytes(self, view: memoryview, begin: int, name: str) -> None:
        while view:
            count = os.preadv(self._file.fileno(), [view], begin)
            if not count:
                raise self._ended_inside(name)
            view, begin = view[count:], begin + count

    def _ended_inside(self, name: str) -> UserError:
        return UserError(f"{self.path}: ended inside {name}; copy it again")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Writer:
    """One file whose disk space is reserved at once and filled in any order."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Shape, str]], *, kind: str) -> None:
        """Writes the header.

        Args:
          path: to write.
          tensors: name -> (shape, dtype).
          kind: "format" in the metadata: "np" or "pt" (transformers requires it).

        Raises:
          OSError: the disk is full, among others.
        """
        header: dict[str, object] = {"__metadata__": {"format": kind}}
        position = 0
        self._places: dict[str, Entry] = {}
        # Wide types first, as in the library, so that each tensor starts at a multiple of its item size.
        for name in sorted(tensors, key=lambda name: (-jnp.dtype(tensors[name][1]).itemsize, name)):
            shape, dtype = tensors[name]
            entry = Entry(shape, dtype, position)
            header[name] = {
                "dtype": _NAMES[dtype], "shape": shape, "data_offsets": [position, position + entry.nbytes]
            }  # fmt: skip
            self._places[name] = entry
            position += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb", buffering=0)
        try:
            os.fchmod(self._file.fileno(), 0o644)  # others may read it, whatever the umask
            self._reserve(self._start + position)
            self._write(0, memoryview(len(text).to_bytes(8, "little") + text))
        except OSError:
            self._file.close()
            raise

    def _reserve(self, size: int) -> None:
        """Gives the file its size, and its disk space where the system can: a full disk shows at once."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise
        self._file.truncate(size)

    def write(self, name: str, value: np.ndarray, row: int | None = None) -> None:
        """Fills the tensor `name`, or its part `row` along the first axis."""
        entry = self._places[name]
        shape = entry.shape if row is None else entry.shape[1:]
        if value.shape != shape or value.dtype != jnp.dtype(entry.dtype):
            raise ValueError(f"{name}: {value.dtype}{value.shape} instead of {entry.dtype}{shape}")
        begin = self._start + entry.begin + (0 if row is None else row * value.nbytes)
        self._write(begin, _bytes(np.ascontiguousarray(value)))

    def _write(self, begin: int, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._file.fileno(), data, begin)
            begin, data = begin + count, data[count:]

    def close(self) -> None:
        """Flushes the file to the disk and closes it."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
