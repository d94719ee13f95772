"""The format of a .json or .jsonl file that a mixture does not name, told by the fields of its first rows."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from crosslmm_jax.errors import UserError

# Fields that the rows of a format have, and those of no other.
_FIELDS = {
    "llava": {"conversations"},
    "videochat2": {"QA"},
    "internvid": {"YoutubeID", "Caption"},
    "moviechat": {"info", "global"},
    "vript": {"meta", "data"},
}
_ROWS = 20  # that are looked at: the first ones may be damaged
_HEAD = 2**16  # characters that are read at first
_BETWEEN = re.compile(r"[\s,]*")


def format_by_fields(path: str, *, where: str) -> str:
    """A key of `formats.FORMATS`; "llava", whose reader names the fault, for a file without readable rows.

    Args:
        path: of the file.
        where: what to call it in messages.

    Raises:
        UserError: naming `where` and the fields, when they are those of no format, or of several.
    """
    first = None
    fix = f"set format to one of {', '.join(_FIELDS)} in a mixture"
    for row in itertools.islice(_head_rows(path), _ROWS):
        if not isinstance(row, Mapping):
            continue
        first = row if first is None else first
        found = [name for name, fields in _FIELDS.items() if fields <= row.keys()]
        if len(found) > 1:
            fields = ", ".join(sorted(set().union(*(_FIELDS[name] for name in found))))
            raise UserError(f"{where}: its rows have fields of several formats ({fields}); {fix}")
        if found:
            return found[0]
    if first is not None:
        fields = ", ".join(map(repr, first)) or "no fields"
        raise UserError(f"{where}: its fields ({fields}) do not tell its format; {fix}")
    return "llava"


def _head_rows(path: str) -> Iterator[Any]:
    """The first values of a JSON list or of a file with one a line, or the only value of a file."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if path.endswith(".jsonl"):
                yield from filter(None, map(_value_of, file))
                return
            text, more, done = "", _HEAD, 0
            while read := file.read(more):
                text, more = text + read, 2 * more
                rows = _rows_in(text)
                yield from rows[done:]
                done = len(rows)
    except OSError:
        return  # left to the reader of the file


def _value_of(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _rows_in(text: str) -> list[Any]:
    """The values that stand whole at the begin of a file that is one list, or several values."""
    decoder, rows = json.JSONDecoder(), []
    place = len(text) - len(text.lstrip())
    place += text[place : place + 1] == "["
    while len(rows) < _ROWS:
        try:
            row, place = decoder.raw_decode(text, _BETWEEN.match(text, place).end())  # type: ignore[union-attr]
        except (ValueError, RecursionError):
            break
        rows.append(row)
    return rows
