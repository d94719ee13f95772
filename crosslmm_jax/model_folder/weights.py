"""Weights in a folder: one safetensors file, or numbered shards and an index.

Tensors are written one at a time, so that a host never holds more than one of them, and read a few at a time.
"""

import collections
import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params
from crosslmm_jax.model_folder.json_file import read_json
from crosslmm_jax.model_folder.safetensors_file import FLOATS, Reader, Shape, Writer
from crosslmm_jax.parallel import is_first_process

MAX_SHARD_BYTES = 4 * 10**9
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HOST_BYTES = 2 * 2**30  # of weights between file and devices; a larger tensor is read alone
PIECE_BYTES = 16 * 2**20  # what a thread reads at once
DTypes = DTypeLike | Mapping[str, PyTree] | None  # for all parameters, or nested dicts of one for each
_Part = tuple[tuple[int, int], ...]  # where a part begins and ends, per axis


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict. Keys are joined by "." and sorted."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        value, name = tree[key], f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every parameter of a model, by path."""
    tree = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}


class WeightsWriter:
    """Writes tensors in any order, straight to their places in the files of a folder. A context manager."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, tuple[Shape, str]], *, kind: str,
        max_shard_bytes: int = MAX_SHARD_BYTES, stem: str = "model",
    ) -> None:  # fmt: skip
        """Reserves the disk space of all files, and writes the index if there are several.

        Args:
          folder: where the files go.
          tensors: name -> (shape, dtype) of everything that will be written.
          kind: "format" in the metadata: "np" or "pt".
          max_shard_bytes: of one file. A larger tensor gets a file of its own.
          stem: of the file names.

        Raises:
          OSError: the disk is full, among others.
        """
        self.file_of: dict[str, str] = {}  # tensor -> file name
        self._writers: dict[str, Writer] = {}
        sizes = {
            name: math.prod(shape) * jnp.dtype(dtype).itemsize for name, (shape, dtype) in tensors.items()
        }
        self.nbytes = sum(sizes.values())
        shards = _shards(sizes, max_shard_bytes)
        try:
            for number, names in enumerate(shards, start=1):
                count = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
                file = f"{stem}{count}.safetensors"
                self._writers[file] = Writer(
                    folder / file, {name: tensors[name] for name in names}, kind=kind
                )
                self.file_of |= dict.fromkeys(names, file)
        except BaseException:
            self.close()
            raise
        if len(shards) > 1:
            write_index(folder, self.file_of, self.nbytes)

    def write(self, name: str, value: np.ndarray, row: int | None = None) -> None:
        """Writes the tensor `name`, or its part `row` along the first axis."""
        self._writers[self.file_of[name]].write(name, value, row)

    def close(self) -> None:
        """Closes all files."""
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> "WeightsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in files of at most `limit` bytes each; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_index(folder: Path, file_of: Mapping[str, str], nbytes: int) -> None:
    """Writes the index: which file holds which tensor, and the bytes of all."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_weights(
    folder: Path, params: Mapping[str, Any], *, dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes parameters into `folder`.

    Every process of a run calls this with the same arguments, and process 0 writes. Parameters that are
    sharded over hosts are gathered one at a time.
    """
    flat = flatten(params)
    tensors = {name: (tuple(leaf.shape), dtype) for name, leaf in flat.items()}
    with contextlib.ExitStack() as stack:
        writer = None
        if is_first_process():
            made = WeightsWriter(folder, tensors, kind="np", max_shard_bytes=max_shard_bytes)
            writer = stack.enter_context(made)
        for name, leaf in flat.items():
            value = _gather(leaf)
            if writer is not None:
                writer.write(name, np.asarray(value, dtype=jnp.dtype(dtype)))


def _gather(leaf: jax.Array | np.ndarray) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


@contextlib.contextmanager
def open_weights(folder: Path, shapes: Mapping[str, Shape]) -> Iterator[dict[str, Reader]]:
    """Tensor -> the open file that holds it.

    Args:
      folder: holds `model.safetensors`, or shards and their index.
      shapes: of the tensors that must be there, and no others.

    Raises:
      UserError: a file is missing or damaged, or tensors are missing, unknown, or of another shape or type;
        all of them are listed.
    """
    with contextlib.ExitStack() as stack:
        readers: dict[str, Reader] = {}
        problems = []
        for file in weight_files(folder):
            try:
                reader = Reader(file)
            except UserError as error:
                problems.append(str(error))
                continue
            stack.callback(reader.close)
            readers |= dict.fromkeys(reader.entries, reader)
        found = {name: reader.entries[name] for name, reader in readers.items()}
        problems += [
            f"{name} has type {entry.dtype} instead of one of {', '.join(FLOATS)}"
            for name, entry in found.items()
            if entry.dtype not in FLOATS
        ]
        problems += [
            f"{name} {list(shapes[name])} is missing" for name in sorted(shapes.keys() - found.keys())
        ]
        problems += [
            f"{name} {list(found[name].shape)} is unknown" for name in sorted(found.keys() - shapes.keys())
        ]
        problems += [
            f"{name} has shape {list(found[name].shape)} instead of {list(shapes[name])}"
            for name in sorted(shapes.keys() & found.keys())
            if found[name].shape != shapes[name]
        ]
        if problems:
            raise UserError(
                f"{folder}: the weights do not fit the config in {len(problems)} place(s):"
                f" {'; '.join(problems)}; use the config.json that was written with these weights, or"
                " complete weights"
            )
        yield readers


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a MODEL folder. Raises a `UserError` when one is missing."""
    if (folder / INDEX_FILE).exists():
        return indexed_files(folder / INDEX_FILE)
    if not (folder / SINGLE_FILE).is_file():
        raise UserError(f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}; give a whole MODEL folder")
    return [folder / SINGLE_FILE]


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> name of its file. Raises a `UserError` when `index` is no index of weights."""
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UserError(f"{index}: field weight_map is no object of file names; copy or download it again")
    return file_of


def indexed_files(index: Path) -> list[Path]:
    """The files that `index` names. Raises a `UserError` that lists all that are missing."""
    names = sorted(set(read_index(index).values()))
    # A name with a folder in it would lead out of the checkpoint's folder.
    outside = [name for name in names if Path(name).name != name]
    if outside or not names:
        raise UserError(f"{index}: field weight_map names {outside}; it must name files beside it")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{index}: names {', '.join(missing)}, which are missing; copy the whole folder")
    return [index.parent / name for name in names]


def read_weights(
    folder: Path,
    shapes: Mapping[str, Shape],
    *,
    shardings: Mapping[str, Any] | None = None,
    dtype: DTypes = None,
) -> dict[str, Any]:
    """The parameters in `folder`, each read straight into its shards.

    Threads read and cast, a few tensors at a time, while earlier ones move to the devices. A process reads
    what its own devices hold, and holds at most HOST_BYTES of it, or one tensor.

    Args:
      folder: holds `model.safetensors`, or shards and their index.
      shapes: parameter path -> shape of all that must be there.
      shardings: tree of shardings like the parameters; None puts everything on the default device.
      dtype: of the result, for all or as a tree like the parameters; None keeps that of the files.

    Raises:
      UserError: as `open_weights`; or a file became shorter.
    """
    flat_shardings = {} if shardings is None else flatten(shardings)
    dtypes = flatten(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
    arrays: dict[str, jax.Array] = {}
    reading: collections.deque[_Reading] = collections.deque()
    moving: collections.deque[_Reading] = collections.deque()
    with open_weights(folder, shapes) as readers, ThreadPoolExecutor(_num_threads()) as pool:

        def move() -> None:
            done = reading.popleft()
            arrays[done.name] = done.array()
            moving.append(done)

        try:
            for name in sorted(shapes, key=lambda name: (str(readers[name].path), _begin(readers, name))):
                tensor = _Reading(readers[name], name, flat_shardings.get(name), dtypes[name])
                while (reading or moving) and tensor.nbytes + _held(reading, moving) > HOST_BYTES:
                    if moving:
                        jax.block_until_ready(arrays[moving.popleft().name])
                    else:
                        move()
                tensor.start(pool)
                reading.append(tensor)
            while reading:
                move()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return unflatten({name: arrays[name] for name in shapes})


def _begin(readers: Mapping[str, Reader], name: str) -> int:
    return readers[name].entries[name].begin


def _held(*queues: Iterable["_Reading"]) -> int:
    return sum(tensor.nbytes for queue in queues for tensor in queue)


def _num_threads() -> int:
    """As many as there are processors, and at least 8: a thread also waits for its disk."""
    return min(32, max(8, os.cpu_count() or 1))


class _Reading:
    """A tensor on the way from its file to the devices: one buffer for each part that this process holds."""

    def __init__(
        self, reader: Reader, name: str, sharding: jax.sharding.Sharding | None, dtype: DTypeLike | None
    ) -> None:
        entry = reader.entries[name]
        self.name, self._reader, self._shape, self._sharding = name, reader, entry.shape, sharding
        self._dtype = jnp.dtype(dtype or entry.dtype)
        held = {} if sharding is None else sharding.addressable_devices_indices_map(entry.shape)
        bounds = [_bounds(index, entry.shape) for index in held.values()] or [_bounds(None, entry.shape)]
        self._parts = list(dict.fromkeys(bounds))  # devices that hold the same part read it once
        self.nbytes = self._dtype.itemsize * sum(
            math.prod(stop - start for start, stop in part) for part in self._parts
        )
        self._buffers: dict[_Part, np.ndarray] = {}
        self._futures: list[Future[None]] = []

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Lets the threads read all parts, in pieces of whole rows of about PIECE_BYTES."""
        for part in self._parts:
            shape = [stop - start for start, stop in part]
            buffer = self._buffers[part] = _aligned(shape, self._dtype)
            rows = shape[0] if shape else 1
            step = max(1, rows * PIECE_BYTES // max(1, buffer.nbytes))
            for row in range(0, rows if buffer.size else 0, step):
                self._futures.append(pool.submit(self._read, part, row, min(row + step, rows)))

    def _read(self, part: _Part, begin: int, end: int) -> None:
        index, buffer = tuple(slice(*bounds) for bounds in part), self._buffers[part]
        if part:
            first = part[0][0]
            index, buffer = (slice(first + begin, first + end), *index[1:]), buffer[begin:end]
        self._reader.read_into(buffer, self.name, index)

    def array(self) -> jax.Array:
        """The tensor on its devices, or on its way there. Waits for the threads; raises what they raised."""
        for future in self._futures:
            future.result()
        if self._sharding is None:
            return jax.device_put(self._buffers[self._parts[0]])
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: self._buffers[_bounds(index, self._shape)]
        )


def _bounds(index: Sequence[Any] | None, shape: Shape) -> _Part:
    """`index` as jax gives it, one slice per axis or None for all, with its ends."""
    if index is None:
        return tuple((0, size) for size in shape)
    ends = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in ends)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes: a CPU device uses it as it is, without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)
