"""Reads annotation files: lists row by row, JSONL line by line; finds the files of a pattern."""

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from crosslmm_jax.data.annotations.json_stream import InvalidJsonError, NoListError, stream_list
from crosslmm_jax.data.annotations.rows import Entry
from crosslmm_jax.errors import Fault, UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"  # a byte order mark and white space
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_files(pattern: str) -> list[str]:
    """The files of a pattern: "{a,b}" and "{000..012}" in order, matches of "*" and "?" sorted.

    A "*" or "?" that matches nothing is returned as it stands, so that the caller can name it as missing.

    Raises:
        UserError: a range counts down and so names no file.
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
    """The alternatives of "{text}": the items of a list, the numbers of a range, or "{text}" itself."""
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return [item.strip() for item in text.split(",")] if "," in text else ["{" + text + "}"]
    first, last = int(numbers[1]), int(numbers[2])
    if first > last:
        fix = f"write {{{numbers[2]}..{numbers[1]}}}"
        raise UserError(f"{pattern}: the range {{{text}}} counts down and names no file; {fix}")
    return [str(number).zfill(len(numbers[1])) for number in range(first, last + 1)]


def files_of(pattern: str, *suffixes: str) -> list[str]:
    """The files of a pattern; a folder is replaced by its files with one of `suffixes`, sorted.

    Raises:
        UserError: a folder has no such file.
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
    """The error for a file that cannot be read."""
    reason = (error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8 text"
    return UserError(f"{path}: cannot be read ({reason}); correct the path or download the file again")


def read_json(path: str) -> object:
    """Reads a JSON file. Raises UserError, naming it, when it cannot be read or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise _no_json(path, getattr(error, "lineno", 1)) from error


def _no_json(path: str, line: int) -> UserError:
    return UserError(f"{path}: line {line} is no valid JSON; fix it or download the file again")


def _with_id(where: str, value: object) -> str:
    """`where` and the id of the row, if it has one."""
    return f"{where} (id {value['id']})" if isinstance(value, dict) and "id" in value else where


def _read_json_list(path: str) -> Iterator[Entry]:
    """Reads the rows of a JSON list. Raises UserError, naming the file, when it cannot be read as one."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, row in enumerate(stream_list(file)):
                yield Entry(_with_id(f"{path}: row {number}", row), row)
    except NoListError:
        raise UserError(
            f"{path}: must hold a list of rows; name a file with one row per line .jsonl"
        ) from None
    except InvalidJsonError as error:
        raise _no_json(path, error.line) from error
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def _read_json_lines(path: str) -> Iterator[Entry]:
    """Reads JSONL, one row per line. A line that is no JSON is a Fault of that row only.

    Raises:
        UserError: the file cannot be read, or none of its lines is JSON.
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
                    where = _with_id(where, value)
                    good += 1
                except (ValueError, RecursionError):
                    first_bad = first_bad or number
                    value = Fault(where, "malformed", f"line {number} is no valid JSON")
                yield Entry(where, value)
                row += 1
    except OSError as error:
        raise unreadable(path, error) from error
    if row and not good:
        raise _no_json(path, first_bad)


def read_json_rows(path: str) -> Iterator[Entry]:
    """Reads the rows of a JSON list, or of JSONL, whatever its name. Raises UserError, naming the file."""
    yield from _read_json_lines(path) if _holds_lines(path) else _read_json_list(path)


def read_json_objects(path: str, setting: object) -> Iterator[Entry]:
    """`read_json_rows` for formats with a setting: each object comes as (object, setting).

    What is no object stays as it is, for the format's `to_row` to refuse.
    """
    for where, value in read_json_rows(path):
        yield Entry(where, (value, setting) if isinstance(value, dict) else value)


def _starts_with(path: str, mark: bytes) -> bool:
    """Whether `mark` is the first character of a JSON file."""
    try:
        with open(path, "rb") as file:
            return file.read(1024).lstrip(_BEFORE_JSON).startswith(mark)
    except OSError as error:
        raise unreadable(path, error) from error


def _holds_lines(path: str) -> bool:
    """Whether a file is JSONL: by its name, or because its first line is a complete object."""
    if path.endswith(".jsonl"):
        return True
    if not _starts_with(path, b"{"):
        return False
    try:
        with open(path, "rb") as file:
            return isinstance(json.loads(next(filter(bytes.strip, file))), dict)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError):
        return False


def read_json_folder(pattern: str) -> Iterator[Entry]:
    """Reads files with one JSON value each, or a list of them, or JSONL.

    There are thousands of such files, so a JSON file that cannot be read is a Fault at its place only.

    Raises:
        UserError: a folder has no such file, or a JSONL file cannot be read.
    """
    for file in files_of(pattern, ".json", ".jsonl"):
        if file.endswith(".jsonl"):
            yield from _read_json_lines(file)
            continue
        try:
            if _starts_with(file, b"["):
                yield from _read_json_list(file)
            else:
                yield Entry(file, read_json(file))
        except UserError as error:
            yield Entry(file, Fault(file, "malformed", str(error).removeprefix(f"{file}: ")))
