"""The format of annotations whose mixture names none: by file name, or by the fields of the first rows."""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from crosslmm_jax.data.annotations.formats import FORMATS
from crosslmm_jax.data.annotations.json_files import expand_files
from crosslmm_jax.errors import UserError

_ROWS = 20  # rows that are looked at: the first ones may be damaged
_HEAD = 2**16  # characters of the first read
_BETWEEN = re.compile(r"[\s,]*")
_FIX = f"set format to one of {', '.join(FORMATS)} in a mixture"


def detect_format(path: str, *, where: str) -> str:
    """The key in FORMATS of a file, a folder or a pattern.

    Args:
        path: file, folder or pattern.
        where: place in the mixture, for messages; `path` itself without a mixture.

    Raises:
        UserError: the format is unknown, or the files of a pattern have several.
    """
    if os.path.isfile(os.path.join(path, "dataset_info.json")):
        return "tfds"
    suffix = Path(path).suffix
    forms = [name for name, form in FORMATS.items() if suffix and suffix == form.suffix]
    if forms:
        return forms[0] if len(forms) == 1 else _format_by_columns(path, forms, where=where)
    if suffix not in (".json", ".jsonl"):
        raise UserError(f"{name_place(where, path)}: its name does not tell its format; {_FIX}")
    files = [file for file in expand_files(path) if os.path.isfile(file)]
    names = {_format_by_fields(file, where=name_place(where, file)): file for file in files}
    if len(names) > 1:
        found = ", ".join(f"{file} of {name}" for name, file in sorted(names.items()))
        raise UserError(
            f"{name_place(where, path)}: holds files of several formats ({found}); list them apart"
        )
    return next(iter(names), "llava")  # without a file: the reader names the missing one


def name_place(where: str, path: str) -> str:
    """`path`, after its place in the mixture if there is one."""
    return path if where == path else f"{where}: {path}"


def _format_by_fields(path: str, *, where: str) -> str:
    """The format of a JSON file; "llava", whose reader names the fault, for a file without readable rows.

    Raises:
        UserError: the fields are those of no format, or of several.
    """
    first = None
    for row in itertools.islice(_first_values(path), _ROWS):
        if not isinstance(row, Mapping):
            continue
        first = row if first is None else first
        found = [
            name for name, form in FORMATS.items()
            if form.fields and not form.suffix and form.has_fields(row.keys())
        ]  # fmt: skip
        if len(found) > 1:
            fields = ", ".join(sorted(set().union(*(FORMATS[name].fields for name in found))))
            raise UserError(f"{where}: its rows have fields of several formats ({fields}); {_FIX}")
        if found:
            return found[0]
    if first is not None:
        fields = ", ".join(map(repr, first)) or "no fields"
        raise UserError(f"{where}: its fields ({fields}) do not tell its format; {_FIX}")
    return "llava"


def _format_by_columns(pattern: str, names: list[str], *, where: str) -> str:
    """The one of `names` that the columns of the first Parquet file of a pattern tell.

    Raises:
        UserError: they tell none.
    """
    import pyarrow
    from pyarrow import parquet

    file = next(filter(os.path.isfile, expand_files(pattern)), None)
    if file is None:
        return names[0]  # the caller names the missing file
    try:
        columns = parquet.read_schema(file).names
    except (OSError, pyarrow.ArrowException):
        return names[0]  # the reader of the file raises it again, with its name
    found = [name for name in names if FORMATS[name].has_fields(set(columns))]
    if not found and "image_url" in columns:
        return "capsfusion"  # as it is published; its reader says what to do
    if not found:
        listed = ", ".join(map(repr, columns)) or "no columns"
        raise UserError(f"{name_place(where, file)}: its columns ({listed}) do not tell its format; {_FIX}")
    return found[0]


def _first_values(path: str) -> Iterator[object]:
    """The first values of a JSON list or of JSONL, or the only value of a JSON file."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if path.endswith(".jsonl"):
                yield from filter(None, map(_value_of, file))
                return
            text, size, done = "", _HEAD, 0
            while read := file.read(size):
                text, size = text + read, 2 * size
                values = _complete_values(text)
                yield from values[done:]
                done = len(values)
    except OSError:
        return  # the reader of the file raises it again, with its name


def _value_of(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _complete_values(text: str) -> list[object]:
    """The complete values at the start of a file that is one list, or several values."""
    decoder, values = json.JSONDecoder(), []
    place = len(text) - len(text.lstrip())
    place += text[place : place + 1] == "["
    while len(values) < _ROWS:
        try:
            value, place = decoder.raw_decode(text, _BETWEEN.match(text, place).end())  # type: ignore[union-attr]
        except (ValueError, RecursionError):
            break
        values.append(value)
    return values
