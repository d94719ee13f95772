"""log.jsonl: what happened in a run, one JSON object per line. It is only ever appended to.

| event | says |
|---|---|
| `start` | hosts, devices, mesh, parameters, the step it starts after, where things go |
| `compiled` | a program, its shape, the seconds, and the backend of each attention |
| `validated` | loss and accuracy of held-out rows, and whether the loss is the smallest so far |
| `bad_row` | a row that is replaced, its reason, and the process that met it |
| `trace` | where a profiler's trace was written |

Every line has the `time` (UTC) and the `step`.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path

from crosslmm_jax.train.reporting.json_lines import JsonLine, JsonLines, read_lines
from crosslmm_jax.train.reporting.side_channel import SideChannel

LOG_FILE = "log.jsonl"


class RunLog:
    """Appends events. A side channel: one that cannot be written is warned of once."""

    def __init__(self, folder: Path) -> None:
        """Opens the log in `folder`."""
        path = folder / LOG_FILE
        self._file = SideChannel(str(path), lambda: JsonLines(path))

    def write(self, event: str, step: int, facts: Mapping[str, object]) -> None:
        """Appends one event."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "event": event, "step": step, **facts}
        self._file.call(lambda file: file.write(line))

    def close(self, seconds: float) -> None:
        """Closes the file, or leaves it behind after some seconds."""
        self._file.close(seconds)


def read_log(folder: str | Path) -> list[JsonLine]:
    """The events in `log.jsonl` of `folder`, up to the first line that is incomplete."""
    return read_lines(Path(folder) / LOG_FILE)
