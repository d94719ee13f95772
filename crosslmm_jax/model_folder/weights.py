"""Parameters as safetensors files: read straight into shards, written in shards, one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crosslmm_jax.errors import UserError

MAX_SHARD_BYTES = 4 * 10**9
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
Shapes = Mapping[str, tuple[int, ...]]
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict, keys joined by "." and sorted."""
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


def write_weights(
    folder: Path, params: Mapping[str, Any], *, dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes `params` as `model.safetensors`, or as numbered shards and an index, into `folder`.

    Every process of a run calls this with the same arguments; process 0 writes. Sharded parameters are put
    together one at a time, so a host never holds more than one file's worth.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    flat = flatten(params)
    size = jnp.dtype(dtype).itemsize
    shards = plan_shards({name: leaf.size * size for name, leaf in flat.items()}, max_shard_bytes)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            value = _to_host(flat[name])
            if jax.process_index() == 0:
                tensors[name] = np.asarray(value, dtype=jnp.dtype(dtype), order="C")
            where[name] = file
        if jax.process_index() == 0:
            try:
                save_file(tensors, folder / file, metadata={"format": "np"})
                (folder / file).chmod(0o644)  # the library makes it unreadable for others
            except SafetensorError as error:  # a full disk comes as this
                raise OSError(f"{file}: {error}") from error
    if jax.process_index() == 0 and len(shards) > 1:
        total = sum(leaf.size * size for leaf in flat.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in files of at most `limit` bytes each; a tensor larger than that has a file of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def read_weights(
    folder: Path, expected: Mapping[str, Any], *, shardings: Mapping[str, Any] | None, dtype: str | None
) -> dict[str, Any]:
    """The parameters in `folder`, each read straight into its shards.

    Args:
      folder: holds `model.safetensors`, or shards and their index.
      expected: tree of `jax.ShapeDtypeStruct`; the files must hold these tensors and no others.
      shardings: tree of shardings like `expected`; None puts everything on the default device.
      dtype: of the result; None keeps that of the files.

    Raises:
      UserError: a file is missing or damaged, or tensors are missing, unknown, or of another shape or type;
        all of them are listed.
    """
    wanted = flatten(expected)
    places = flatten(shardings) if shardings is not None else {}
    with _Files(folder) as files:
        shapes = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
        check_tensors(folder, found=files.shapes, wanted=shapes, problems=files.problems)
        flat = {name: files.read(name, sharding=places.get(name), dtype=dtype) for name in wanted}
    return unflatten(flat)


def check_tensors(folder: Path, *, found: Shapes, wanted: Shapes, problems: list[str]) -> None:
    """Raises a `UserError` listing `problems` and every tensor of `folder` that is not as `wanted`."""
    problems = [*problems]
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    problems += [f"{name} {list(wanted[name])} is missing" for name in missing]
    problems += [f"{name} {list(found[name])} is unknown" for name in unknown]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(wanted[name])}"
        for name in sorted(set(wanted) & set(found))
        if found[name] != wanted[name]
    ]
    if problems:
        raise UserError(
            f"{folder}: the weights do not fit the config in {len(problems)} place(s): {'; '.join(problems)};"
            " use the config.json that was written with these weights, or complete weights"
        )


class _Files:
    """The safetensors files of a folder, opened without reading their tensors."""

    def __init__(self, folder: Path) -> None:
        self.problems: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, Any] = {}
        self._of: dict[str, Any] = {}
        for file in files_of(folder):
            self._open(file)

    def _open(self, file: Path) -> None:
        import safetensors

        try:
            handle = safetensors.safe_open(file, framework="numpy")
        except (OSError, safetensors.SafetensorError) as error:
            self.problems.append(f"{file.name} cannot be read ({error})")
            return
        self._handles[file.name] = handle
        for name in handle.keys():  # noqa: SIM118 (a handle is not a dict)
            view = handle.get_slice(name)
            self.shapes[name] = tuple(view.get_shape())
            self._of[name] = handle
            if view.get_dtype() not in _DTYPES:
                kinds = ", ".join(_DTYPES)
                self.problems.append(f"{name} has type {view.get_dtype()} instead of one of {kinds}")

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.clear()
        self._of.clear()

    def read(self, name: str, *, sharding: Any, dtype: str | None) -> jax.Array:
        """The tensor `name` on its devices; only the parts that this process holds are read."""
        handle, shape = self._of[name], self.shapes[name]
        view = handle.get_slice(name)
        target = jnp.dtype(dtype or _DTYPES[view.get_dtype()])
        parts: dict[str, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            key = str(index)  # devices that hold the same part read it once
            if key not in parts:
                value = view[index] if shape else handle.get_tensor(name)
                parts[key] = np.asarray(value, dtype=target)
            return parts[key]

        if sharding is None:
            return jax.device_put(part(tuple(slice(None) for _ in shape)))
        return jax.make_array_from_callback(shape, sharding, part)


def files_of(folder: Path) -> Iterator[Path]:
    """The files that hold weights; raises `UserError` naming all that are missing."""
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).is_file():
            raise UserError(f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}; give a whole MODEL folder")
        return iter([folder / SINGLE_FILE])
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: is no index of weights ({error}); write the folder again") from error
    # A name with a folder in it would lead out of the MODEL folder.
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise UserError(f"{index}: field weight_map names {outside}; it must name files beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: lacks {', '.join(missing)}, which its index names; copy the whole folder")
    return iter([folder / name for name in names])
