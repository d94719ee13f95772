"""Reading annotation files: JSON whole, JSONL line by line, every fault named."""

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosslmm_jax.data.annotations.rows import Entry
from crosslmm_jax.errors import Fault, UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"  # a byte order mark and white space
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_files(pattern: str) -> list[str]:
    """The files that a pattern names: "{a,b}" and "{000..012}" in order, "*" and "?" sorted.

    A pattern whose stars match nothing comes back as it is, to be named as missing.

    Raises:
        UserError: a range counts down, which would be no file at all.
    """
    pieces = _BRACES.split(pattern)
    choices = [
        [piece] if number % 2 == 0 else _alternatives(piece, pattern) for number, piece in enumerate(pieces)
    ]
    files = []
    for parts in itertools.product(*choices):
        name = "".join(parts)
        matched = sorted(glob.glob(name)) if re.search(r"[*?]", name) else []
        files += matched or [name]
    return files


def _alternatives(text: str, pattern: str) -> list[str]:
    """What stands for "{text}" in `pattern`: the items of a list, the numbers of a range, or itself."""
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return [item.strip() for item in text.split(",")] if "," in text else ["{" + text + "}"]
    first, last = int(numbers[1]), int(numbers[2])
    if first > last:
        fix = f"write {{{numbers[2]}..{numbers[1]}}}"
        raise UserError(f"{pattern}: the range {{{text}}} counts down and names no file; {fix}")
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]


def files_of(pattern: str, *suffixes: str) -> list[str]:
    """The files of `pattern`; a folder among them stands for its files with one of `suffixes`, sorted.

    Raises:
        UserError: a folder holds none.
    """
    files: list[str] = []
    for path in expand_files(pattern):
        if not os.path.isdir(path):
            files.append(path)
            continue
        found = sorted(name for name in os.listdir(path) if name.endswith(suffixes))
        if not found:
            raise UserError(f"{path}: holds no {' or '.join(suffixes)} file; correct the path")
        files += [os.path.join(path, name) for name in found]
    return files


def unreadable(path: str, error: Exception) -> UserError:
    """The error of a file that cannot be read at all."""
    reason = (error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8 text"
    return UserError(f"{path}: cannot be read ({reason}); correct the path or download the file again")


def read_json(path: str) -> Any:
    """What a JSON file holds. Raises UserError naming the file when it cannot be read or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        at = getattr(error, "lineno", 1)
        raise UserError(f"{path}: line {at} is no valid JSON; mend or download the file again") from error


def name_row(where: str, value: Any) -> str:
    """`where` with the row's id, if it has one."""
    return f"{where} (id {value['id']})" if isinstance(value, dict) and "id" in value else where


def read_json_list(path: str) -> Iterator[Entry]:
    """Rows of a JSON list. Raises UserError naming the file when it cannot be read or holds none."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: must hold a list of rows; name a file of one row a line .jsonl")
    for number, row in enumerate(rows):
        yield Entry(name_row(f"{path}: row {number}", row), row)


def read_json_lines(path: str) -> Iterator[Entry]:
    """Objects of a file with one a line; a line that is no JSON is a fault of that row alone.

    Raises:
        UserError: naming the file, when it cannot be read or not one of its lines is JSON.
    """
    row, good, first_bad = 0, 0, 0
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{path}: row {row}"
                try:
                    value = json.loads(line)
                    where = name_row(where, value)
                    good += 1
                except (ValueError, RecursionError):
                    first_bad = first_bad or number
                    value = Fault(where, "malformed", f"line {number} is no valid JSON")
                yield Entry(where, value)
                row += 1
    except OSError as error:
        raise unreadable(path, error) from error
    if row and not good:
        raise UserError(f"{path}: line {first_bad} is no valid JSON; mend or download the file again")


def read_json_rows(path: str) -> Iterator[Entry]:
    """Rows of a JSON list, or of a file with one object a line, whatever its name.

    Raises:
        UserError: as `read_json_list` and `read_json_lines`.
    """
    yield from read_json_lines(path) if _holds_lines(path) else read_json_list(path)


def _holds_lines(path: str) -> bool:
    """Whether a file is JSONL: by its name, or as its first line is an object of its own."""
    if path.endswith(".jsonl"):
        return True
    try:
        with open(path, "rb") as file:
            if file.read(1024).lstrip(_BEFORE_JSON)[:1] != b"{":
                return False
            file.seek(0)
            return isinstance(json.loads(next(filter(bytes.strip, file))), dict)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError):
        return False


def read_json_folder(pattern: str) -> Iterator[Entry]:
    """What each file of one JSON value a video holds, or of JSONL files each line.

    A file that cannot be read is a fault of its rows alone, as there are thousands of them.

    Raises:
        UserError: a folder holds no such file, or a JSONL file cannot be read.
    """
    for file in files_of(pattern, ".json", ".jsonl"):
        if file.endswith(".jsonl"):
            yield from read_json_lines(file)
            continue
        try:
            yield Entry(file, read_json(file))
        except UserError as error:
            yield Entry(file, Fault(file, "malformed", str(error).removeprefix(f"{file}: ")))
