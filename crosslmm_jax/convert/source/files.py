"""Tensors of other projects' checkpoints, read one at a time: safetensors, torch's .bin, numpy's .npz.

No pickle is ever executed: `.bin` and `.pt` are read by torch's `weights_only` loader, if torch is installed
(it is no dependency), and `.npz` by numpy with `allow_pickle=False`.
"""

import contextlib
import dataclasses
import math
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import jax.numpy as jnp
import numpy as np

from crosslmm_jax.convert.report import condense
from crosslmm_jax.convert.source.unreadable import check_readable
from crosslmm_jax.errors import UserError
from crosslmm_jax.model_folder import Reader, Shape, indexed_files, read_index
from crosslmm_jax.utils import cannot_read, is_lfs_pointer

if TYPE_CHECKING:
    import torch

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")


@dataclasses.dataclass(frozen=True)
class Info:
    """Shape and type of a tensor, known before it is read."""

    shape: Shape
    dtype: str  # numpy's name

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Source(Protocol):
    """Tensors by name."""

    path: Path
    tensors: dict[str, Info]
    files: dict[str, str]  # tensor -> name of its file

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`."""
        ...

    def close(self) -> None:
        """Closes its files."""
        ...


@contextlib.contextmanager
def open_source(path: str | Path) -> Iterator[Source]:
    """The tensors of a folder or of one file.

    A folder holds an index (of `*.safetensors`, else of `pytorch_model*.bin`) or a single file.

    Raises:
      UserError: there is nothing to read; a file is missing, truncated, or holds anything but tensors; or the
        index does not agree with the files.
    """
    source = _open(Path(path))
    try:
        _check_index(source)
        yield source
    finally:
        source.close()


def _open(path: Path) -> Source:
    check_readable("", path)
    files = [path] if path.is_file() else _files_of(path)
    suffix = files[0].suffix
    if suffix == ".safetensors":
        return SafetensorsSource(path, files)
    if suffix in _TORCH_SUFFIXES:
        return TorchSource(path, files)
    if suffix == ".npz":
        return NpzSource(files[0])
    raise UserError(f"{path}: is no .safetensors, .bin, .pt or .npz; give a checkpoint in one of these")


def _files_of(folder: Path) -> list[Path]:
    for name in _INDEX_FILES:
        if (folder / name).is_file():
            return indexed_files(folder / name)
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    for pattern in ("*.safetensors", "*.npz"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found
        if found:
            names = ", ".join(file.name for file in found)
            raise UserError(
                f"{folder}: has {names} but no index of them; add {_INDEX_FILES[0]} or name a file"
            )
    raise UserError(f"{folder}: has no {' or '.join(_SINGLE_FILES)} and no index; give a checkpoint's folder")


def _check_index(source: Source) -> None:
    """Raises a `UserError` that lists every tensor whose file is not the one in the index."""
    index = next((source.path / name for name in _INDEX_FILES if (source.path / name).is_file()), None)
    if index is None:
        return
    indexed, found = read_index(index), source.files
    problems = {
        "missing in the file it names": [name for name in indexed if name not in found],
        "in another file than it names": [
            name for name, file in indexed.items() if found.get(name, file) != file
        ],
        "not in it": [name for name in found if name not in indexed],
    }
    listed = [f"{', '.join(condense(names))}: {problem}" for problem, names in problems.items() if names]
    if listed:
        raise UserError(f"{index}: does not fit the files ({'; '.join(listed)}); copy the whole folder again")


def _add(tensors: dict[str, Info], name: str, info: Info, path: Path) -> None:
    if name in tensors:
        raise UserError(f"{path}: holds {name}, which another file of this checkpoint holds too; keep one")
    tensors[name] = info


class SafetensorsSource:
    """One or several safetensors files."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        """Reads the headers. Raises a `UserError` that lists every damaged file."""
        self.path = path
        self.tensors: dict[str, Info] = {}
        self.files: dict[str, str] = {}
        self._reader_of: dict[str, Reader] = {}
        self._readers: list[Reader] = []
        problems = []
        for file in files:
            try:
                reader = Reader(file)
            except UserError as error:
                problems.append(str(error))
                continue
            self._readers.append(reader)
            for name, entry in reader.entries.items():
                _add(self.tensors, name, Info(entry.shape, entry.dtype), file)
                self._reader_of[name], self.files[name] = reader, file.name
        if problems:
            self.close()
            raise UserError("; ".join(problems))

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`."""
        return self._reader_of[name].read(name)

    def close(self) -> None:
        """Closes the files."""
        for reader in self._readers:
            reader.close()


class TorchSource:
    """One or several files of `torch.save`, mapped into memory."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        """Raises a `UserError` when torch is not installed or a file holds anything but tensors."""
        self.path = path
        self.tensors: dict[str, Info] = {}
        self.files: dict[str, str] = {}
        self._values: dict[str, torch.Tensor] = {}
        for file in files:
            for name, value in _load_torch(file).items():
                _add(self.tensors, name, Info(tuple(value.shape), str(value.dtype).split(".")[1]), file)
                self._values[name], self.files[name] = value, file.name

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`."""
        import torch

        value = self._values[name].detach().contiguous()  # numpy takes no nn.Parameter
        if value.dtype == torch.bfloat16:  # numpy knows it only through ml_dtypes
            return value.view(torch.int16).numpy().view(jnp.dtype("bfloat16"))
        return value.numpy()

    def close(self) -> None:
        """Releases the tensors."""
        self._values.clear()


def _load_torch(file: Path) -> dict[str, "torch.Tensor"]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file}: torch is needed to read this format; pip install torch, or save it as safetensors"
        ) from error
    if is_lfs_pointer(file):  # text, which torch takes for a pickle
        raise cannot_read(file, "")
    try:
        # Mapping works for the zip format only, which torch has written since 1.6.
        mapped = zipfile.is_zipfile(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file}: holds something other than tensors and is not opened; save its state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: cannot be read ({reason}); copy or download it again") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f"{file}: is no state dict (names and tensors only); save its state_dict() instead")
    return loaded


class NpzSource:
    """big_vision's `.npz`. Layers that its scan has stacked appear one by one, under the unstacked names."""

    _STACKED = "/encoderblock/"

    def __init__(self, path: Path) -> None:
        """Reads the headers of the arrays. Raises a `UserError` on damage and on pickled objects."""
        self.path = path
        self.tensors: dict[str, Info] = {}
        self._member: dict[str, tuple[str, int | None]] = {}
        self._last: tuple[str, np.ndarray] | None = None
        try:
            self._file = np.load(path, allow_pickle=False)
            for name in self._file.files:
                self._declare(name, *self._header(name))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise cannot_read(path, f"is no whole .npz of arrays ({error}); download it again") from error
        self.files = dict.fromkeys(self.tensors, path.name)

    def _header(self, name: str) -> tuple[Shape, str]:
        with self._file.zip.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{name} is a pickled object")
        # numpy writes bfloat16 as two nameless bytes.
        return shape, "bfloat16" if dtype == np.dtype("V2") else dtype.name

    def _declare(self, name: str, shape: Shape, dtype: str) -> None:
        full = name if name.startswith(("params/", "opt/")) else f"params/{name}"
        if self._STACKED not in full:
            self.tensors[full], self._member[full] = Info(shape, dtype), (name, None)
            return
        for row in range(shape[0]):
            single = full.replace(self._STACKED, f"/encoderblock_{row}/")
            self.tensors[single], self._member[single] = Info(shape[1:], dtype), (name, row)

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`."""
        member, row = self._member[name]
        if (
            self._last is None or self._last[0] != member
        ):  # the layers of a stack are read one after the other
            value = self._file[member]
            self._last = (member, value.view(jnp.dtype("bfloat16")) if value.dtype.kind == "V" else value)
        value = self._last[1]
        return value if row is None else value[row]

    def close(self) -> None:
        """Closes the file."""
        self._last = None
        self._file.close()
