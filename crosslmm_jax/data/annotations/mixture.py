"""Mixtures: YAML files that list data sets, as LLaVA-NeXT and VideoChat-Flash write them; and their rows.

    datasets:
      - json_path: a.json              # or path; "/data/{a,b}.json" is two data sets
        sampling_strategy: first:10%   # all, first:N, first2:N, first3:N, first4:N, end:N, random:N
        data_root: videos              # folder that its media paths are relative to
        media_type: video              # image, video, text or mix
        video_read_type: gif           # decord, av, gif, img or lazy; checked, but has no effect
        folder_fps: 2                  # pictures per second of folders of pictures; by default 1, 3 for TVQA
      - path: internvid.jsonl
        format: internvid              # a key of `formats.FORMATS`; by default detected from name and rows
        weight: 2                      # how often its rows are drawn, relative to the other data sets
        name: clips                    # by default the name of the file
        skip_missing: true             # skip the data set when its file does not exist
        options: {clips: cut}          # settings of the format
      - path: my_set/1.0.0             # folder of a data set of TensorFlow Datasets stored as ArrayRecord

`skip_missing` beside `datasets` holds for all of them. Other keys there may define anchors. Paths are
relative to the YAML file. A key that appears twice is refused, unless both values are the same.

VideoChat-Flash's own mixtures name web pages as `data_root`. A second YAML file (`--path-map`) says where
their content lies:

    https://huggingface.co/datasets/lmms-lab: /data/lmms-lab    # the longest beginning that fits counts
    annotations: /data/videochat_flash/annotations              # of `json_path` too
    http://activity-net.org: null                               # its data sets are left out
"""

import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar, get_args

from crosslmm_jax.data.annotations.detect_format import detect_format, name_place
from crosslmm_jax.data.annotations.formats import FORMATS
from crosslmm_jax.data.annotations.json_files import expand_files
from crosslmm_jax.data.annotations.mixture_yaml import PathMap, read_path_map, read_yaml
from crosslmm_jax.data.annotations.rows import (
    TVQA_FPS,
    DatasetSpec,
    Entry,
    MediaType,
    Origin,
    Row,
    is_rate,
    is_tvqa,
)
from crosslmm_jax.data.annotations.strategies import parse_strategy, select
from crosslmm_jax.data.text import writable
from crosslmm_jax.errors import DataError, Fault, UserError

_LOG = logging.getLogger(__name__)
_KEYS = {
    "json_path", "path", "sampling_strategy", "data_root", "media_type", "video_read_type", "format",
    "folder_fps", "weight", "name", "skip_missing", "options",
}  # fmt: skip
_PATHS = ("path", "json_path", "data_root")  # keys that hold paths
_VERSION = re.compile(r"\d+\.\d+\.\d+")
READ_TYPES = ("decord", "av", "gif", "img", "lazy")
_Word = TypeVar("_Word", bound=str)


def read_mixture(
    path: str, *, media_root: str | None = None, path_map: str | None = None
) -> list[DatasetSpec]:
    """Reads the data sets of a mixture.

    Args:
        path: a YAML file, or the annotations of one data set ("{a,b}.json": of several).
        media_root: folder of the media where the mixture names none; a relative `data_root` is relative to
            it. By default the folder of the annotations, and for `data_root` that of the YAML file.
        path_map: a YAML file that maps beginnings of the mixture's paths to local folders, as
            `mixture_yaml.read_path_map` reads it.

    Raises:
        UserError: the mixture is malformed, a file is missing without `skip_missing`, or a folder of media
            does not exist. Names file, data set and field.
    """
    if media_root is not None and not os.path.isdir(media_root):
        raise UserError(f"{media_root}: no such folder; set --media-root to where the media lie")
    if path.endswith((".yaml", ".yml")):
        items, skip_missing = _read_yaml(path)
        folder = os.path.dirname(path)
    else:
        items, skip_missing, folder = [{"path": path}], False, ""
    paths = read_path_map(path_map)
    specs: list[DatasetSpec] = []
    remote: dict[str, str] = {}  # address -> place in the mixture
    for number, item in enumerate(items):
        where = f"{path}: datasets[{number}]" if folder or len(items) > 1 else path
        if not isinstance(item, Mapping):
            raise UserError(f"{where}: must hold keys such as json_path")
        skip = _flag(item, "skip_missing", where) or skip_missing
        local = _localise(item, paths, where=where)
        if local is None:
            _LOG.warning("%s: left out, as %s says", where, path_map)
        elif elsewhere := [str(local[key]) for key in _PATHS if "://" in str(local.get(key))]:
            if skip:
                _LOG.warning("%s: skipped, as %s is on another machine", where, elsewhere[0])
            else:
                remote |= dict.fromkeys(elsewhere, where)
        else:
            found = _read_item(local, where=where, folder=folder, media_root=media_root)
            specs += [spec for spec in found if _exists(spec, where, skip=skip)]
    if remote:
        raise UserError(
            f"{next(iter(remote.values()))}: on another machine: {', '.join(remote)}; write the folder that"
            " you downloaded it to, or map it there with --path-map MAP.yaml, one `address: folder` per line"
        )
    if not specs:
        raise UserError(f"{path}: names no data set that exists; list files under `datasets`")
    return _with_unique_names(specs)


def _read_yaml(path: str) -> tuple[list[object], bool]:
    content = read_yaml(path) or {}
    items = content.get("datasets")
    if not isinstance(items, list):
        raise UserError(f"{path}: must hold `datasets:` and a list below it")
    if unknown := content.keys() - {"datasets", "skip_missing"}:
        raise UserError(
            f"{path}: unknown key {sorted(map(str, unknown))[0]!r}; known: datasets, skip_missing"
        )
    return items, _flag(content, "skip_missing", path)


def _flag(entry: Mapping[str, object], key: str, where: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}; write true or false")
    return value


def _localise(item: Mapping[str, object], paths: PathMap, *, where: str) -> dict[str, object] | None:
    """An item with local paths; None when the map of paths leaves it out."""
    local = dict(item)
    if item.get("folder_fps") is None and any(is_tvqa(str(item.get(key))) for key in _PATHS):
        local["folder_fps"] = TVQA_FPS
    for key in _PATHS:
        value = item.get(key)
        if isinstance(value, str):
            local[key] = paths.local(value)
            if local[key] is None:
                return None
    return local


def _read_item(
    item: Mapping[str, object], *, where: str, folder: str, media_root: str | None
) -> Iterator[DatasetSpec]:
    """The data sets of one item of `datasets`: several where its path has braces."""
    if unknown := item.keys() - _KEYS:
        key = sorted(map(str, unknown))[0]
        raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(_KEYS))}")
    pattern = item.get("path", item.get("json_path"))
    if not isinstance(pattern, str) or not pattern or ("path" in item and "json_path" in item):
        raise UserError(f"{where}: json_path must name the file of the annotations")
    strategy = str(item.get("sampling_strategy", "all"))
    parse_strategy(strategy, where=where)
    media_type = _choice(item, "media_type", get_args(MediaType), where)
    _choice(item, "video_read_type", READ_TYPES, where)
    rate = item.get("folder_fps")
    if rate is not None and not is_rate(rate):
        raise UserError(f"{where}: folder_fps is {rate!r}; write a number of pictures per second above 0")
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.001 <= weight <= 1000:
        # Weights become fractions with a denominator of at most 1000: less would be 0.
        raise UserError(f"{where}: weight is {weight!r}; write a number from 0.001 to 1000")
    pattern = os.path.join(folder, pattern)
    kind = _choice(item, "format", tuple(FORMATS), where) or detect_format(pattern, where=where)
    for file in [pattern] if FORMATS[kind].many_files else expand_files(pattern):
        name = item.get("name", _short_name(file))
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: name is {name!r}; write a text")
        yield DatasetSpec(
            name=name, path=file, format=kind, strategy=strategy, media_type=media_type,
            root=_root(item.get("data_root"), file, where=where, folder=folder, media_root=media_root),
            weight=float(weight), folder_fps=rate, options=_options(item, kind, where),
        )  # fmt: skip


def _short_name(path: str) -> str:
    """The stem of a file; of a pattern, and of a version ("1.0.0") of a data set, the name of its folder."""
    pattern = Path(os.path.abspath(path))
    if pattern.is_dir():
        return pattern.parent.name if _VERSION.fullmatch(pattern.name) else pattern.name
    return pattern.parent.name if set("*?{") & set(pattern.name) else pattern.stem


def _choice(item: Mapping[str, object], key: str, known: tuple[_Word, ...], where: str) -> _Word | None:
    value = item.get(key)
    if value is not None and value not in known:
        raise UserError(f"{where}: {key} is {value!r}; write one of {', '.join(known)}")
    return next((word for word in known if word == value), None)


def _options(item: Mapping[str, object], kind: str, where: str) -> dict[str, object]:
    options = item.get("options", {})
    known = FORMATS[kind].options
    if not isinstance(options, Mapping) or (unknown := options.keys() - known):
        what = (
            f"unknown option {sorted(map(str, unknown))[0]!r}" if isinstance(options, Mapping) else "no map"
        )
        raise UserError(f"{where}: options: {what}; format {kind} knows {', '.join(sorted(known)) or 'none'}")
    return dict(options)


def _root(data_root: object, file: str, *, where: str, folder: str, media_root: str | None) -> str:
    if data_root is None:
        folder = file if os.path.isdir(file) else os.path.dirname(file)
        return media_root if media_root is not None else folder or "."
    if not isinstance(data_root, str):
        raise UserError(f"{where}: data_root is {data_root!r}; write the folder that you downloaded it to")
    return os.path.join(folder if media_root is None else media_root, data_root)


def _exists(spec: DatasetSpec, where: str, *, skip: bool) -> bool:
    """Whether the files and the media root of a data set exist.

    Raises:
        UserError: one does not exist and `skip` is false, or the name of the root is not UTF-8.
    """
    if writable(root := os.path.abspath(spec.root)) != root:
        raise UserError(f"{where}: {writable(root)}: the name of a folder of media must be UTF-8; rename it")
    missing = next((file for file in expand_files(spec.path) if not os.path.exists(file)), None)
    fix = (
        "correct it"
        if where == spec.path
        else "correct json_path or map it with --path-map, or set skip_missing: true"
    )
    if missing is None and not os.path.isdir(spec.root):
        missing, fix = spec.root, "correct data_root or give --media-root, or set skip_missing: true"
    if missing is None:
        return True
    if not skip:
        raise UserError(f"{name_place(where, missing)}: no such file or folder; {fix}")
    _LOG.warning("%s: skipped, as %s does not exist", where, missing)
    return False


def _with_unique_names(specs: list[DatasetSpec]) -> list[DatasetSpec]:
    """Renames the second data set called "a" to "a#2", or to "a#3" where "a#2" is taken."""
    given, used = {spec.name for spec in specs}, set[str]()
    named = []
    for spec in specs:
        names = (f"{spec.name}#{number}" for number in itertools.count(2))
        name = (
            spec.name if spec.name not in used else next(name for name in names if name not in given | used)
        )
        used.add(name)
        named.append(dataclasses.replace(spec, name=name))
    return named


def read_entries(spec: DatasetSpec, *, seed: int) -> Iterator[tuple[int, Entry]]:
    """Reads the entries of a data set that its strategy selects, with their numbers.

    They come lazily and in the order of the files. Strategies that depend on the number of rows (end, random,
    percentages) read the files twice.

    Args:
        spec: the data set.
        seed: seed of the random strategy; the same on every host.

    Raises:
        UserError: a file cannot be read, has another format, or holds no rows. Names the file.
    """
    form = FORMATS[spec.format]
    strategy = parse_strategy(spec.strategy, where=spec.path)
    selection = select(strategy, lambda: sum(1 for _ in form.entries(spec)), seed=f"{seed}/{spec.name}")
    number = -1
    for number, entry in enumerate(form.entries(spec)):
        if selection.ends_before(number):
            break
        if number in selection:
            yield number, entry
    if number < 0:
        raise UserError(f"{spec.path}: holds no rows; leave it out of the mixture")


def make_row(spec: DatasetSpec, number: int, entry: Entry, *, allow_outside: bool = False) -> Row | Fault:
    """The row of entry `number` of a data set, or why it cannot be used.

    `allow_outside`: media paths may leave the root.
    """
    origin = Origin(writable(entry.where), number, spec, allow_outside)
    try:
        to_row = FORMATS[spec.format].to_row
        found = entry.value if isinstance(entry.value, Fault) else to_row(entry.value, origin)
    except DataError as error:
        found = error.fault
    if isinstance(found, Fault):
        path, detail = writable(found.path), writable(found.detail)
        return Fault(origin.where, found.reason, detail, path, spec.name, number)
    return found


def read_rows(spec: DatasetSpec, *, seed: int, allow_outside: bool = False) -> Iterator[Row | Fault]:
    """The rows of `read_entries`; a row that cannot be used comes as a Fault."""
    for number, entry in read_entries(spec, seed=seed):
        yield make_row(spec, number, entry, allow_outside=allow_outside)


def annotation_files(spec: DatasetSpec) -> Iterator[str]:
    """The files that the rows of a data set are read from, in order; of a folder, the files in it."""
    for path in expand_files(spec.path):
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else None
        names = [path] if inside is None else [os.path.join(path, name) for name in inside]
        yield from (name for name in names if inside is None or os.path.isfile(name))
