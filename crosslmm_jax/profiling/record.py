"""What a measuring process is asked, and what it has found so far.

The record is written anew after each row, so that a process that dies leaves what it had.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from crosslmm_jax.config import Precision
from crosslmm_jax.profiling.flops import Costs, Workload, total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One system to measure, in one process."""

    task: str  # a module of this package: prefill, decode, ...
    system: str  # a preset or a peer
    frames: tuple[int, ...]
    tokens_per_frame: int | None = None  # None: the preset's own
    overrides: tuple[str, ...] = ()  # FIELD=VALUE, of the preset
    precision: Precision = "compute"  # of encoder, projector and T2V's cache
    v2v_scopes: tuple[str, ...] = ()  # each is measured; (): the preset's own
    remats: tuple[str, ...] = ()  # of the encoder in training, each is measured; (): the preset's own
    parts: tuple[int, ...] = ()  # that keys are cut into for cross-attention on cuDNN, each is measured
    devices: tuple[int, ...] = ()  # device counts that scaling compares; none: one and two
    text: int = 64  # tokens of the prompt that are not visual
    before: int = 16  # of these, how many stand before the video
    steps: int = 64  # generated tokens that a decode is timed over
    repeats: int = 5
    compile_jobs: int = 1  # programs compiled at once
    trace: str | None = None  # folder for a profile of one call of each case
    videos: str | None = None  # folder of the videos that `precision` reads

    @staticmethod
    def from_json(text: str) -> "Request":
        """What `to_json` wrote."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in json.loads(text).items()
        }
        return Request(**values)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self))

    def workload(self, frames: int) -> Workload:
        """The prompt with `frames` frames."""
        return Workload(frames=frames, text=self.text, before=self.before)


class Record:
    """Rows, facts and errors of one process, in a JSON file that is always whole."""

    def __init__(self, path: str, request: Request) -> None:
        """Starts the file `path`."""
        self._path = Path(path)
        self.request = request
        self.facts: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.save()

    def add_facts(self, **facts: Any) -> None:
        """Notes what holds for all rows: the device, its measured rates."""
        self.facts |= facts
        self.save()

    def add_row(self, row: dict[str, Any], costs: Costs | None = None) -> None:
        """Adds a row, with what follows from its time, its FLOPs and the measured matmul rate.

        That rate is bfloat16's for rows in 8 bits too, so that all rows compare: theirs may exceed 1.
        """
        row = {"system": self.request.system, **row}
        if costs is not None:
            row["model_tflop"] = total(costs) / 1e12
            row["parts_tflop"] = {part: cost.total / 1e12 for part, cost in costs.items()}
            row["tflops"] = 1e3 * row["model_tflop"] / row["ms"]
            if "matmul_tflops" in self.facts:
                row["fraction_of_matmul"] = row["tflops"] / self.facts["matmul_tflops"]
        self.rows.append(row)
        self.save()
        names = ("system", "what", "frames", "precision", "ms", "peak_mb", "tflops")
        shown = {name: row[name] for name in names if name in row}
        print(
            " ".join(f"{name}={_short(value)}" for name, value in shown.items()), file=sys.stderr, flush=True
        )

    def add_error(self, where: str, error: BaseException) -> None:
        """Notes a failure that the rest goes on without."""
        text = " ".join(str(error).split())
        self.errors.append(f"{self.request.system}, {where}: {type(error).__name__}: {text[:600]}")
        print(self.errors[-1], file=sys.stderr, flush=True)
        self.save()

    def save(self) -> None:
        """Writes the file in one piece."""
        content = {
            "request": dataclasses.asdict(self.request),
            "facts": self.facts,
            "rows": self.rows,
            "errors": self.errors,
        }
        partial = self._path.with_name(self._path.name + ".part")
        partial.write_text(json.dumps(content))
        os.replace(partial, self._path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
