"""Reads the values of a JSON list one at a time: a list of millions of rows does not fit in memory."""

import json
import re
from collections.abc import Iterator
from typing import TextIO

_PIECE = 2**20  # characters of a read
_SPACE = re.compile(r"[ \t\n\r]*")
_CUT = 16  # characters; an error this close to the end of what was read may come from the cut


class NoListError(Exception):
    """The file holds something other than a list."""


class InvalidJsonError(ValueError):
    """Line `line` is no valid JSON."""

    def __init__(self, line: int) -> None:
        """`line` counts from 1."""
        super().__init__(line)
        self.line = line


def stream_list(file: TextIO) -> Iterator[object]:
    """Yields the values of the list that a JSON file holds.

    Only the value at hand and about a piece of the text are in memory.

    Raises:
        NoListError: the file holds something else.
        InvalidJsonError: the text is no valid JSON; values before the error were yielded.
        UnicodeDecodeError, OSError: it cannot be read.
    """
    text = _Text(file)
    match text.next_mark():
        case "[":
            text.place += 1
        case "":
            raise text.invalid()
        case _:
            raise NoListError
    if text.next_mark() == "]":
        text.place += 1
    else:
        yield text.value()
        while (mark := text.next_mark()) == ",":
            text.place += 1
            yield text.value()
        if mark != "]":
            raise text.invalid()
        text.place += 1
    if text.next_mark():
        raise text.invalid()


class _Text:
    """The part of a file between what was parsed and what was read."""

    def __init__(self, file: TextIO) -> None:
        self.place = 0  # of what comes next
        self._file, self._text, self._lines, self._ended = file, "", 1, False
        self._decode = json.JSONDecoder().raw_decode

    def invalid(self, place: int | None = None) -> InvalidJsonError:
        """The error at a place, by default at the current one."""
        end = self.place if place is None else place
        return InvalidJsonError(self._lines + self._text.count("\n", 0, end))

    def next_mark(self) -> str:
        """The next character that is no white space; "" at the end of the file."""
        while True:
            self.place = _SPACE.match(self._text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self._text) or not self._read_more():
                return self._text[self.place : self.place + 1]

    def value(self) -> object:
        """Parses the value that comes next."""
        self.next_mark()
        while True:
            try:
                value, end = self._decode(self._text, self.place)
                # "1" may be the start of "1.5".
                if self._ended or len(self._text) - end > _CUT or not isinstance(value, int | float):
                    self.place = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _CUT
                if self._ended or not cut:
                    raise self.invalid(error.pos) from None
            except (ValueError, RecursionError):  # a number of too many digits; a value nested too deep
                raise self.invalid() from None
            self._read_more()

    def _read_more(self) -> bool:
        """Reads the next piece, or as much again as waits to be parsed; False at the end of the file."""
        rest = self._text[self.place :]
        piece = self._file.read(max(_PIECE, len(rest)))
        self._ended = not piece
        if piece:
            self._lines += self._text.count("\n", 0, self.place)
            self._text, self.place = rest + piece, 0
        return bool(piece)
