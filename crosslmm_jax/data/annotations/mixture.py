"""Mixtures: YAML files that list data sets, as LLaVA-NeXT and VideoChat-Flash write them, and their rows.

    datasets:
      - json_path: a.json              # or path; "/data/{a,b}.json" is two data sets
        sampling_strategy: first:10%   # all, first:N, first2:N, first3:N, first4:N, end:N, random:N
        data_root: videos              # folder that its media paths are relative to
        media_type: video              # image, video, text or mix
        video_read_type: gif           # decord, av, gif, img or lazy
      - path: internvid.jsonl
        format: internvid              # a key of `formats.FORMATS`; by default told from name and rows
        weight: 2                      # how often its rows are drawn, relative to the others
        name: clips                    # by default the file's name
        skip_missing: true             # leave the data set out when its file is not there
        options: {clips: cut}          # settings of the format
      - path: my_set/1.0.0             # a data set of TensorFlow Datasets kept as ArrayRecord: its folder

`skip_missing` may also stand beside `datasets`, for all of them. Paths are relative to the file.
"""

import dataclasses
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from crosslmm_jax.data.annotations.detect_format import format_by_fields
from crosslmm_jax.data.annotations.formats import FORMATS
from crosslmm_jax.data.annotations.json_files import expand_files, unreadable
from crosslmm_jax.data.annotations.rows import DatasetSpec, MediaType, Origin, Row
from crosslmm_jax.data.annotations.strategies import parse_strategy, select
from crosslmm_jax.data.text import writable
from crosslmm_jax.errors import DataError, Fault, UserError

_LOG = logging.getLogger(__name__)
_KEYS = {
    "json_path", "path", "sampling_strategy", "data_root", "media_type", "video_read_type", "format",
    "weight", "name", "skip_missing", "options",
}  # fmt: skip
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SUFFIXES = {".parquet": "capsfusion", ".tar": "webdataset"}
READ_TYPES = ("decord", "av", "gif", "img", "lazy")


def read_mixture(path: str, *, media_root: str | None = None) -> list[DatasetSpec]:
    """The data sets of a mixture.

    Args:
        path: a .yaml file, or the annotations of a single data set ("{a,b}.json": of several).
        media_root: folder of the media where the mixture names none, and what a relative `data_root` is
            relative to. By default each file's own folder, and the folder of the YAML file.

    Raises:
        UserError: naming file, data set and field, when the file is malformed, a data set's file is missing
            and not skippable, or a folder of media does not exist.
    """
    if media_root is not None and not os.path.isdir(media_root):
        raise UserError(f"{media_root}: no such folder; set media_root to where the media lie")
    if path.endswith((".yaml", ".yml")):
        entries, skip_missing = _read_yaml(path)
        folder = os.path.dirname(path)
    else:
        entries, skip_missing, folder = [{"path": path}], False, ""
    specs: list[DatasetSpec] = []
    for number, entry in enumerate(entries):
        where = f"{path}: datasets[{number}]" if folder or len(entries) > 1 else path
        for spec in _read_entry(entry, where=where, folder=folder, media_root=media_root):
            if _is_there(spec, where, skip=_flag(entry, "skip_missing", where) or skip_missing):
                specs.append(spec)
    if not specs:
        raise UserError(f"{path}: names no data set that is there; list files under `datasets`")
    return _with_unique_names(specs)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a map, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys[key.value] > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> tuple[list[Any], bool]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else "it"
        why = getattr(error, "problem", None) or "unknown characters"
        raise UserError(f"{path}: {line} is no valid YAML ({why}); mend it") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("datasets"), list):
        raise UserError(f"{path}: must hold `datasets:` and a list below it")
    if unknown := content.keys() - {"datasets", "skip_missing"}:
        raise UserError(
            f"{path}: unknown key {sorted(map(str, unknown))[0]!r}; known: datasets, skip_missing"
        )
    return content["datasets"], _flag(content, "skip_missing", path)


def _flag(entry: Mapping[str, Any], key: str, where: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}; write true or false")
    return value


def _read_entry(entry: Any, *, where: str, folder: str, media_root: str | None) -> Iterator[DatasetSpec]:
    """The data sets of one item of `datasets`: several where its path has braces."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: must hold keys such as json_path")
    if unknown := entry.keys() - _KEYS:
        key = sorted(map(str, unknown))[0]
        raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(_KEYS))}")
    pattern = entry.get("path", entry.get("json_path"))
    if not isinstance(pattern, str) or not pattern or ("path" in entry and "json_path" in entry):
        raise UserError(f"{where}: json_path must name the file of the annotations")
    strategy = str(entry.get("sampling_strategy", "all"))
    parse_strategy(strategy, where=where)
    media_type = _choice(entry, "media_type", get_args(MediaType), where)
    read_type = _choice(entry, "video_read_type", READ_TYPES, where)
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.001 <= weight <= 1000:
        # Weights are kept as fractions of at most a thousandth: less would be none.
        raise UserError(f"{where}: weight is {weight!r}; write a number from 0.001 to 1000")
    pattern = os.path.join(folder, pattern)
    kind = _choice(entry, "format", tuple(FORMATS), where) or _guess_format(pattern, where)
    for file in [pattern] if FORMATS[kind].many_files else expand_files(pattern):
        name = entry.get("name", _short_name(file))
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: name is {name!r}; write a text")
        yield DatasetSpec(
            name=name, path=file, format=kind, strategy=strategy, media_type=media_type, read_type=read_type,
            root=_root(entry.get("data_root"), file, where=where, folder=folder, media_root=media_root),
            weight=float(weight), options=_options(entry, kind, where),
        )  # fmt: skip


def _short_name(path: str) -> str:
    """The stem of a file; of a pattern, and of a version ("1.0.0") of a data set, the name of its folder."""
    pattern = Path(os.path.abspath(path))
    if pattern.is_dir():
        return pattern.parent.name if _VERSION.fullmatch(pattern.name) else pattern.name
    return pattern.parent.name if set("*?{") & set(pattern.name) else pattern.stem


def _guess_format(path: str, where: str) -> str:
    """The format of files by their name or rows, or of a folder by what lies in it.

    Raises:
        UserError: it is unknown, or the files of a pattern are of several.
    """
    if os.path.isfile(os.path.join(path, "dataset_info.json")):
        return "tfds"
    suffix = Path(path).suffix
    if guessed := _SUFFIXES.get(suffix):
        return guessed
    if suffix in (".json", ".jsonl"):
        files = [file for file in expand_files(path) if os.path.isfile(file)]
        kinds = {format_by_fields(file, where=_named(where, file)): file for file in files}
        if len(kinds) > 1:
            found = ", ".join(f"{file} of {kind}" for kind, file in sorted(kinds.items()))
            raise UserError(
                f"{_named(where, path)}: holds files of several formats ({found}); list them apart"
            )
        return next(iter(kinds), "llava")  # where there is none, the missing file is named later
    fix = f"set format to one of {', '.join(FORMATS)} in a mixture"
    raise UserError(f"{_named(where, path)}: its name does not tell its format; {fix}")


def _named(where: str, path: str) -> str:
    """`path` behind the place that names it, which is the path itself where there is no mixture."""
    return path if where == path else f"{where}: {path}"


def _choice(entry: Mapping[str, Any], key: str, known: tuple[str, ...], where: str) -> Any:
    value = entry.get(key)
    if value is not None and value not in known:
        raise UserError(f"{where}: {key} is {value!r}; write one of {', '.join(known)}")
    return value


def _options(entry: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    options = entry.get("options", {})
    known = FORMATS[kind].options
    if not isinstance(options, Mapping) or (unknown := options.keys() - known):
        what = (
            f"unknown option {sorted(map(str, unknown))[0]!r}" if isinstance(options, Mapping) else "no map"
        )
        raise UserError(f"{where}: options: {what}; format {kind} knows {', '.join(sorted(known)) or 'none'}")
    return dict(options)


def _root(data_root: Any, file: str, *, where: str, folder: str, media_root: str | None) -> str:
    if data_root is None:
        own = file if os.path.isdir(file) else os.path.dirname(file)
        return media_root if media_root is not None else own or "."
    if not isinstance(data_root, str) or "://" in data_root:
        raise UserError(f"{where}: data_root is {data_root!r}; write the folder that you downloaded it to")
    return os.path.join(folder if media_root is None else media_root, data_root)


def _is_there(spec: DatasetSpec, where: str, *, skip: bool) -> bool:
    """Whether files and root of a data set exist.

    Raises:
        UserError: naming what does not, unless `skip`; or a root that no index can name.
    """
    if writable(root := os.path.abspath(spec.root)) != root:
        raise UserError(f"{where}: {writable(root)}: the name of a folder of media must be UTF-8; rename it")
    missing = next((file for file in expand_files(spec.path) if not os.path.exists(file)), None)
    fix = "correct it" if where == spec.path else "correct json_path, or set skip_missing: true"
    if missing is None and not os.path.isdir(spec.root):
        missing, fix = spec.root, "correct data_root or set media_root, or set skip_missing: true"
    if missing is None:
        return True
    if not skip:
        raise UserError(f"{_named(where, missing)}: no such file or folder; {fix}")
    _LOG.warning("%s: left out, as %s is not there", where, missing)
    return False


def _with_unique_names(specs: list[DatasetSpec]) -> list[DatasetSpec]:
    """The second data set called "a" becomes "a#2", or "a#3" where another is called that already."""
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


def read_rows(spec: DatasetSpec, *, seed: int, allow_outside: bool = False) -> Iterator[Row | Fault]:
    """The rows of a data set that its strategy selects, in file order, read as they are asked for.

    Strategies that depend on the number of rows (end, random, percentages) read the files twice.

    Args:
        spec: the data set.
        seed: of the random strategy; the same on every host.
        allow_outside: let media paths leave the root.

    Raises:
        UserError: naming the file, when it cannot be read, is of another format, or holds no rows.
    """
    form = FORMATS[spec.format]
    strategy = parse_strategy(spec.strategy, where=spec.path)
    selection = select(strategy, lambda: sum(1 for _ in form.entries(spec)), seed=f"{seed}/{spec.name}")
    number = -1
    for number, entry in enumerate(form.entries(spec)):
        if selection.ends_before(number):
            break
        if number in selection:
            origin = Origin(writable(entry.where), number, spec, allow_outside)
            try:
                found = entry.value if isinstance(entry.value, Fault) else form.to_row(entry.value, origin)
            except DataError as error:
                found = error.fault
            if isinstance(found, Fault):
                path, detail = writable(found.path), writable(found.detail)
                found = Fault(origin.where, found.reason, detail, path, spec.name, number)
            yield found
    if number < 0:
        raise UserError(f"{spec.path}: holds no rows; leave it out of the mixture")
