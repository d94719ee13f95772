"""Runs a plan tensor by tensor, into the files of a MODEL folder or into the shards of a mesh."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from crosslmm_jax.convert.plan import Leaf, Plan
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params
from crosslmm_jax.model_folder import INDEX_FILE, MAX_SHARD_BYTES, Writer, flatten, plan_shards, unflatten
from crosslmm_jax.utils import Progress

Tensors = Mapping[str, tuple[tuple[int, ...], str]]  # name -> (shape, dtype)


class Sink(Protocol):
    """Where converted parameters go. Each is begun, written whole or row by row, and ended."""

    def begin(self, leaf: Leaf) -> None:
        """The parameter `leaf` comes next."""
        ...

    def write(self, value: np.ndarray, row: int | None) -> None:
        """All of it, or its part `row` along the first axis."""
        ...

    def end(self) -> None:
        """It is complete."""
        ...


def run_plan(plan: Plan, sink: Sink, *, seed: int) -> None:
    """Fills `sink` with every parameter, holding one tensor of the source at a time.

    Args:
      plan: where they come from.
      sink: where they go.
      seed: of those that are initialised.

    Raises:
      UserError: a value does not fit the type that the user asked for.
    """
    begin = time.perf_counter()
    total = sum(_nbytes(leaf) for leaf in plan.leaves)
    with Progress("convert", unit="bytes", total=total) as progress:
        for leaf in plan.leaves:
            sink.begin(leaf)
            for row, value in _values(plan, leaf, seed):
                sink.write(value, row)
                progress.update(progress.done + value.nbytes)
            sink.end()
    plan.report.bytes, plan.report.seconds = total, time.perf_counter() - begin


def _nbytes(leaf: Leaf) -> int:
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def _values(plan: Plan, leaf: Leaf, seed: int) -> Iterator[tuple[int | None, np.ndarray]]:
    if not leaf.origins:
        yield None, cast(_initial_value(plan, leaf.name, seed), leaf.dtype, name=leaf.name)
    for origin in leaf.origins:
        value = origin.slot.into(origin.source.read(origin.key))
        yield origin.row, cast(value, leaf.dtype, name=origin.key)


def _initial_value(plan: Plan, name: str, seed: int) -> np.ndarray:
    """The parameter `name` of `init_params`; nothing else is computed."""

    def one(key: Any) -> Any:
        return flatten(init_params(plan.config, key))[name]

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return np.asarray(jax.jit(one)(jax.random.key(seed)))


def cast(value: np.ndarray, dtype: str, *, name: str) -> np.ndarray:
    """`value` as `dtype`; raises `UserError` when a number is too large for it."""
    target = jnp.dtype(dtype)
    if value.dtype == target:
        return value
    with np.errstate(over="ignore"):
        changed = value.astype(target)
    if dtype == "float16" and np.any(np.isinf(changed) & np.isfinite(value)):
        raise UserError(f"{name} holds numbers too large for float16; use --dtype bfloat16 or float32")
    return changed


class FileSink:
    """safetensors files whose bytes are written in place: nothing is held back in memory."""

    def __init__(
        self, folder: Path, tensors: Tensors, *, kind: str, max_shard_bytes: int = MAX_SHARD_BYTES,
        stem: str = "model",
    ) -> None:  # fmt: skip
        """Takes the room of all files on the disk.

        Args:
          folder: to write into.
          tensors: all that will come.
          kind: the metadata's "format", "np" or "pt".
          max_shard_bytes: of a file, unless one tensor is larger.
          stem: of the file names.

        Raises:
          OSError: the disk is full, among others.
        """
        self.where: dict[str, str] = {}  # tensor -> file
        self._writers: dict[str, Writer] = {}
        self._leaf = ""
        sizes = {
            name: math.prod(shape) * jnp.dtype(dtype).itemsize for name, (shape, dtype) in tensors.items()
        }
        self.nbytes = sum(sizes.values())
        shards = plan_shards(sizes, max_shard_bytes)
        try:
            for number, names in enumerate(shards, start=1):
                count = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
                file, held = f"{stem}{count}.safetensors", {name: tensors[name] for name in names}
                self._writers[file] = Writer(folder / file, held, kind=kind)
                self.where |= dict.fromkeys(names, file)
        except BaseException:
            self.close()
            raise
        if len(shards) > 1:
            write_index(folder, self.where, self.nbytes)

    def begin(self, leaf: Leaf) -> None:
        """The parameter `leaf` comes next."""
        self._leaf = leaf.name

    def write(self, value: np.ndarray, row: int | None) -> None:
        """All of it, or its part `row` along the first axis."""
        self.write_tensor(self._leaf, value, row)

    def end(self) -> None:
        """Nothing is left to do."""

    def write_tensor(self, name: str, value: np.ndarray, row: int | None = None) -> None:
        """The tensor `name`, whole or its part `row`."""
        self._writers[self.where[name]].write(name, value, row)

    def close(self) -> None:
        """Closes all files."""
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> "FileSink":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_index(folder: Path, where: Mapping[str, str], nbytes: int) -> None:
    """The index that says which file holds which tensor."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class DeviceSink:
    """Arrays on devices: the host holds its parts of one parameter at a time."""

    def __init__(self, shardings: Mapping[str, Any]) -> None:
        """Takes a tree of shardings like the parameters'."""
        self._shardings = flatten(shardings)
        self._done: dict[str, jax.Array] = {}
        self._parts: dict[str, tuple[tuple[slice, ...], np.ndarray]] = {}
        self._leaf: Leaf | None = None

    def begin(self, leaf: Leaf) -> None:
        """Makes room for the parts of `leaf` that this process's devices hold."""
        self._leaf, self._parts = leaf, {}
        indices = self._shardings[leaf.name].addressable_devices_indices_map(leaf.shape)
        for index in indices.values():
            bounds = tuple(slice(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True))
            shape = tuple(part.stop - part.start for part in bounds)
            self._parts.setdefault(str(bounds), (bounds, np.empty(shape, jnp.dtype(leaf.dtype))))

    def write(self, value: np.ndarray, row: int | None) -> None:
        """Copies what falls into each part."""
        for bounds, part in self._parts.values():
            if row is None:
                part[...] = value[bounds]
            elif bounds[0].start <= row < bounds[0].stop:
                part[row - bounds[0].start] = value[bounds[1:]]

    def end(self) -> None:
        """Puts the parts on their devices."""
        leaf = self._leaf
        assert leaf is not None, "a parameter is begun first"

        def part_of(index: Any) -> np.ndarray:
            bounds = tuple(slice(*part.indices(size)) for part, size in zip(index, leaf.shape, strict=True))
            return self._parts[str(bounds)][1]

        sharding = self._shardings[leaf.name]
        self._done[leaf.name] = jax.make_array_from_callback(leaf.shape, sharding, part_of)
        self._parts = {}

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, nested."""
        return unflatten(self._done)
