"""A progress bar on a terminal, plain lines elsewhere, nothing when quiet. Writes to stderr."""

import sys
import time

_LINE_EVERY = 10.0  # seconds between plain lines


class RowProgress:
    """Counts rows."""

    def __init__(self, title: str, *, total: int | None = None, quiet: bool = False) -> None:
        """Starts at 0 of `total` rows; None when nobody knows how many there are."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._title, self._total, self._quiet = title, total, quiet
        self._begin = self._said = time.monotonic()
        self._bar = None
        console = Console(stderr=True)
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, note="")
            self._bar.start()

    def update(self, done: int, note: str = "") -> None:
        """`done` rows are done."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif not self._quiet and now - self._said >= _LINE_EVERY:
            self._said = now
            of = f"/{self._total}" if self._total is not None else ""
            rate = done / (now - self._begin)
            print(f"{self._title}: {done}{of} rows  {rate:.0f} rows/s  {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
