"""Errors in a user's input, printed as one line with exit code 2 and no traceback.

A row or a medium that cannot be used does not stop a run. It is a `Fault`, raised as a `DataError` by a
format's `to_row`, while media are decoded, or while tokens are made. Code that continues without the row
catches the `DataError` and keeps its `Fault`, which is counted by `reason` and written to bad.jsonl.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Literal

# Exit codes of `crosslmm`.
USER_MISTAKE = 2  # as argparse uses
STALLED = 75  # EX_TEMPFAIL: a process was lost or stuck, or did not stop in time; the same command may go on
INTERRUPTED = 130  # 128 + SIGINT, as shells use: stopped as asked, nothing is lost


class UserError(Exception):
    """A mistake in the user's input. The message names the file or field and the fix."""


class FailedElsewhere(UserError):
    """Another process of this run has met an error, and says which by itself."""


class Stalled(Exception):
    """The run cannot go on for a reason outside of it. The same command may work later."""


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; the same command resumes it."""


class ConfigError(UserError, ValueError):
    """A configuration value that cannot work. The message names field, value and what would be right."""


Reason = Literal[
    "malformed", "conversation", "placeholders", "too_long", "clip_times", "outside_root", "not_downloaded",
    "missing", "empty", "not_a_file", "wrong_type", "no_video", "zero_fps", "truncated", "corrupt",
    "too_large", "timeout", "changed", "other",
]  # fmt: skip
REASONS: dict[Reason, str] = {
    "malformed": "the annotation is no valid JSON, or a field is missing or of the wrong type",
    "conversation": "no question, no answer, or a turn that cannot be read",
    "placeholders": "there is not exactly one <image> or <video> per medium",
    "too_long": "not even the first exchange fits into max_text_tokens",
    "clip_times": "start and end are no times, or not within the video",
    "outside_root": "the path leaves the media root",
    "not_downloaded": "img2dataset did not download the image",
    "missing": "there is no such file, or nothing of that name in the tar, ArrayRecord or Parquet file",
    "empty": "the file has no bytes, or the folder has no images",
    "not_a_file": "a folder, pipe, socket or device in place of a file",
    "wrong_type": "a format or codec that cannot be read, or a video where the row says image",
    "no_video": "the file has no video stream",
    "zero_fps": "the video has neither timestamps nor a frame rate",
    "truncated": "the file ends early",
    "corrupt": "the file is damaged",
    "too_large": "the frames, or the media of one row, are over the size limit",
    "timeout": "reading gave nothing new for deadline_s seconds",
    "changed": "the file is not the one that was indexed",
    "other": "any other error, e.g. no permission to read the file",
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a row or a medium cannot be used. `str(fault)` is the message for people.

    Attributes:
        where: file, row and id of a row; the path of a medium.
        reason: a key of REASONS, to count by.
        detail: what is wrong and how to fix it, in a sentence.
        path: the row's medium at fault, or "".
        dataset: name of the row's data set, or "".
        row: number of the row: in its data set, or in the index once there is one. -1 for a medium.
    """

    where: str
    reason: Reason
    detail: str
    path: str = ""
    dataset: str = ""
    row: int = -1

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"

    def line(self) -> str:
        """The line of bad.jsonl: a JSON object and a newline."""
        names = ("dataset", "row", "path", "reason", "where", "detail")
        return json.dumps({name: getattr(self, name) for name in names}, ensure_ascii=False) + "\n"


class DataError(UserError):
    """A row or a medium cannot be used. `fault` says why; the other arguments are its fields."""

    def __init__(self, where: object, reason: Reason, detail: str, path: str = "") -> None:
        """`where` is a text, or a medium whose `str` is its path."""
        super().__init__(str(where), reason, detail, path)  # what pickling hands to the copy
        self.fault = Fault(str(where), reason, detail, path)

    def __str__(self) -> str:
        return str(self.fault)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the type of an error without one."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def list_counts(counts: Mapping[str, int]) -> list[str]:
    """How often each reason occurred, for people: "3 missing"."""
    return [f"{count} {reason}" for reason, count in sorted(counts.items())]
