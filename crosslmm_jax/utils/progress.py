"""Progress of a long task on stderr: a bar on a terminal, plain lines elsewhere, nothing when quiet.

Where stderr cannot be written, as when its reader is gone, the task goes on without progress.
"""

import contextlib
import sys
import time


class Progress:
    """Counts what is done of one task. Use it as a context manager, or call `close` at the end.

    Attributes:
        done: how many are done.
        total: how many there are; may be set anew. None if that is not known.
    """

    def __init__(
        self, title: str, *, unit: str, total: int | None = None, done: int = 0,
        seconds_between_lines: float | None = 10.0, quiet: bool = False,
    ) -> None:  # fmt: skip
        """Starts the bar, if stderr is a terminal.

        Args:
            title: the name of the task.
            unit: what is counted, in the plural. "bytes" are shown as GB and MB/s.
            total: how many there are; None if that is not known.
            done: how many an earlier process has done.
            seconds_between_lines: between the plain lines of `update`; None leaves all lines to `report`.
            quiet: show nothing.
        """
        from rich import progress as rich_progress
        from rich.console import Console

        self.done = done
        self._title, self._unit, self.total, self._quiet = title, unit, total, quiet
        self._seconds_between_lines = seconds_between_lines
        self._first_done = done
        self._begin = self._last_line = time.monotonic()
        self._bar = None
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            amounts: tuple[rich_progress.ProgressColumn, ...] = (rich_progress.MofNCompleteColumn(),)
            if unit == "bytes":
                amounts = (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
            self._bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(), *amounts,
                rich_progress.TimeElapsedColumn() if total is None else rich_progress.TimeRemainingColumn(),
                rich_progress.TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            with contextlib.suppress(OSError):
                self._bar.start()

    def update(self, done: int, note: str | None = None) -> None:
        """Moves to `done`. Without a terminal this prints a line now and then, with `note` at its end."""
        self.done = done
        if self._bar is not None:
            self._move(done, note)
            return
        now = time.monotonic()
        if self._seconds_between_lines is not None and now - self._last_line >= self._seconds_between_lines:
            self._last_line = now
            self._print(f"{self._rate((done - self._first_done) / (now - self._begin))}  {note or ''}")

    def report(self, done: int, note: str) -> None:
        """Moves to `done` and shows `note`. Without a terminal this prints a line at once."""
        self.done = done
        if self._bar is not None:
            self._move(done, note)
        else:
            self._print(note)

    def say(self, text: str) -> None:
        """Prints a line of its own, above the bar if there is one."""
        if self._quiet:
            return
        with contextlib.suppress(OSError):
            if self._bar is None:
                print(f"{self._title}: {text}", file=sys.stderr, flush=True)
            else:
                self._bar.console.print(f"{self._title}: {text}", markup=False, highlight=False)

    def close(self) -> None:
        """Stops the bar, which stays on the screen."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _move(self, done: int, note: str | None) -> None:
        assert self._bar is not None
        with contextlib.suppress(OSError):
            if note is None:
                self._bar.update(self._task, completed=done, total=self.total)
            else:
                self._bar.update(self._task, completed=done, total=self.total, note=note)

    def _print(self, text: str) -> None:
        if not self._quiet:
            with contextlib.suppress(OSError):
                print(f"{self._title}: {self._amount()}  {text}".rstrip(), file=sys.stderr, flush=True)

    def _amount(self) -> str:
        if self._unit == "bytes":
            of = "" if self.total is None else f" of {self.total / 1e9:.2f}"
            return f"{self.done / 1e9:.2f}{of} GB"
        return f"{self.done}{'' if self.total is None else f'/{self.total}'} {self._unit}"

    def _rate(self, per_second: float) -> str:
        return f"{per_second / 1e6:.0f} MB/s" if self._unit == "bytes" else f"{per_second:.0f} {self._unit}/s"
