"""Files of one JSON object per line that survive kills and full disks."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

JsonLine = dict[str, Any]


def read_lines(path: Path) -> list[JsonLine]:
    """The lines of a file, up to the first that is incomplete; none if there is no file."""
    return [line for line, _ in _lines_with_ends(path)]


def _lines_with_ends(path: Path) -> Iterator[tuple[JsonLine, int]]:
    """The complete lines of a file, each with the position where it ends."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        end += len(line)
        try:
            read = json.loads(line)
        except ValueError:
            return  # the process died while it wrote this line
        if not line.endswith(b"\n"):
            return
        yield read, end


class JsonLines:
    """Appends lines to a file. Lines that could not be written are written before the next one."""

    def __init__(self, path: Path, *, keep: Callable[[JsonLine], bool] | None = None) -> None:
        """Opens `path`. Of what is there stays all up to the last line that `keep` accepts; None: all."""
        self._path, self._unwritten = path, b""
        if path.exists():
            # In place: a full disk has no room for a copy.
            ends = [end for line, end in _lines_with_ends(path) if keep is None or keep(line)]
            os.truncate(path, max(ends, default=0))

    def write(self, line: Mapping[str, object]) -> None:
        """Appends one line. Raises OSError if it cannot be written now."""
        self._unwritten += json.dumps(line).encode() + b"\n"
        self._write()

    def _write(self) -> None:
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(self._unwritten):
                    written += file.write(self._unwritten[written:])
            except OSError:
                file.truncate(end)  # no half lines
                raise
        self._unwritten = b""

    def close(self) -> None:
        """Writes what could not be written before."""
        if self._unwritten:
            self._write()
