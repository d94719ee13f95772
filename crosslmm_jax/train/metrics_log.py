"""Metrics of a run on disk: metrics.jsonl and TensorBoard scalars."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crosslmm_jax.utils import atomic_write

METRICS_FILE = "metrics.jsonl"
MetricsLine = dict[str, Any]  # "step" and nested dicts of numbers


def read_metrics(folder: str | Path) -> list[MetricsLine]:
    """The lines of `metrics.jsonl` in `folder`, up to the first that is incomplete."""
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # the process died while it wrote this line
    return lines


def flatten_scalars(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics with names joined by "/", as TensorBoard groups them."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(flatten_scalars(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = float(value)
    return flat


class MetricsLog:
    """Appends lines of metrics. In a run of several processes only process 0 has one.

    A run that resumes from step n drops the lines after n, so that the file reads like that of an
    uninterrupted run.
    """

    def __init__(self, folder: Path, *, resumed_step: int, tensorboard: bool) -> None:
        """Opens the files in `folder` for a run that has done `resumed_step` steps."""
        kept = [line for line in read_metrics(folder) if line["step"] <= resumed_step]
        path = folder / METRICS_FILE
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            with _barred("torch"):  # where it is installed, tensorboardX imports it, for seconds
                from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, line: MetricsLine) -> None:
        """Appends one line, which has a "step"."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in flatten_scalars(line).items():
                if name != "step":
                    self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


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
