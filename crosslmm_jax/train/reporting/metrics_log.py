"""Metrics of a run on disk: metrics.jsonl and TensorBoard scalars. Neither delays or stops training."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from crosslmm_jax.train.reporting.json_lines import JsonLine, JsonLines, read_lines
from crosslmm_jax.train.reporting.side_channel import SideChannel

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

METRICS_FILE = "metrics.jsonl"
MetricsLine = JsonLine  # "step" and nested dicts of numbers
MAX_WAIT_S = 10.0  # for a disk that hangs


def read_metrics(folder: str | Path) -> list[MetricsLine]:
    """The lines of `metrics.jsonl` in `folder`, up to the first that is incomplete."""
    return read_lines(Path(folder) / METRICS_FILE)


def flatten_scalars(metrics: Mapping[str, object], prefix: str = "") -> dict[str, float]:
    """Nested metrics with names joined by "/", as TensorBoard groups them; only those that are numbers."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(flatten_scalars(value, f"{prefix}{name}/"))
        elif isinstance(value, int | float):
            flat[prefix + name] = float(value)
    return flat


class MetricsLog:
    """Appends lines of metrics. In a run of several processes only process 0 has one.

    A run that resumes from step n drops the lines after n, so that the file reads like that of an
    uninterrupted run. Both outputs are side channels: what cannot be written is warned of once.
    """

    def __init__(self, folder: Path, *, resumed_step: int, tensorboard: bool) -> None:
        """Opens the files in `folder` for a run that has done `resumed_step` steps."""
        path = folder / METRICS_FILE
        self._file = SideChannel(
            str(path), lambda: JsonLines(path, keep=lambda line: line["step"] <= resumed_step)
        )
        self._file.call(lambda _: None)  # drops the lines now, not at the first report
        self._tensorboard: SideChannel[_EventsFile] | None = None
        if tensorboard:
            with _barred("torch"):  # where it is installed, tensorboardX imports it, for seconds
                import tensorboardX  # noqa: F401  (here, and not in the thread)

            events = folder / "tensorboard"
            self._tensorboard = SideChannel(
                str(events), lambda: _EventsFile(events, first_step=resumed_step + 1)
            )

    def write(self, line: MetricsLine) -> None:
        """Appends one line, which has a "step"."""
        self._file.call(lambda file: file.write(line))
        if self._tensorboard is not None:
            self._tensorboard.call(lambda file: file.write(line))

    def wait(self) -> None:
        """Returns when all lines are in metrics.jsonl, if its disk does not hang.

        Called before a checkpoint is written: a run that resumes from it finds the lines up to it.
        """
        self._file.wait(MAX_WAIT_S)

    def close(self) -> None:
        """Closes the files."""
        self._file.close(MAX_WAIT_S)
        if self._tensorboard is not None:
            self._tensorboard.close(MAX_WAIT_S)


class _EventsFile:
    """A TensorBoard file, written at each call. It ends at the first failure, which may leave half an event.

    tensorboardX's own `SummaryWriter` hands events to a thread through a queue. If that thread fails, the
    queue fills and the caller waits for ever.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        self._writer: EventsWriter | None = None
        self._failed = False

    def write(self, line: MetricsLine) -> None:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        if self._failed:
            return
        scalars = flatten_scalars({name: value for name, value in line.items() if name != "step"})
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        try:
            if self._writer is None:
                self._writer = self._open()
            self._writer.write_event(
                Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values))
            )
            self._writer.flush()
        except OSError:
            self._failed = True
            with contextlib.suppress(OSError):
                self.close()
            raise

    def _open(self) -> "EventsWriter":
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

        self._folder.mkdir(parents=True, exist_ok=True)
        writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}")
        # TensorBoard then hides what an earlier process wrote of these steps.
        started = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time.time(), step=self._first_step, session_log=started))
        return writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@contextlib.contextmanager
def _barred(name: str) -> Iterator[None]:
    """As if no package of this name was installed, unless it is imported already."""
    barred = name not in sys.modules
    if barred:
        sys.modules[name] = None  # type: ignore[assignment]  # how python marks what cannot be imported
    try:
        yield
    finally:
        if barred:
            del sys.modules[name]
