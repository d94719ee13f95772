"""What one measuring process is asked, and what it has found so far.

The record is written after each row, so that a process that dies leaves the rows that it had.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from crosslmm_jax.config import Precision
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import flops
from crosslmm_jax.utils import atomic_write

Row = dict[str, Any]  # JSON values by name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One system to measure in one process. A task with further options subclasses it.

    Raises:
      UserError: a count that cannot be measured; the message names the option.
    """

    task: str  # dotted name of a module with `run(record)`
    system: str  # a preset, or what else the task can measure
    frames: tuple[int, ...]
    tokens_per_frame: int | None = None  # None: as in the preset
    overrides: tuple[str, ...] = ()  # words of fields of the model, e.g. ("--vision.remat", "none")
    precision: Precision = "compute"  # of encoder, projector and T2V's KV cache
    v2v_scopes: tuple[str, ...] = ()  # each is measured; (): the preset's scope
    remats: tuple[str, ...] = ()  # of the encoder in training, each is measured; (): as in the preset
    text: int = 64  # text tokens of the prompt
    before: int = 16  # of these, the tokens before the video
    steps: int = 64  # generated tokens over which decode is timed
    repeats: int = 5
    compile_jobs: int = 1  # programs compiled at the same time
    trace: str | None = None  # folder for a profile of one call of each case
    preallocate: bool = False  # take the device's memory at once: for temporaries that fill half of it
    users_allocator: bool = False  # memory as jax takes it for a user, in place of one with a high-water mark

    def __post_init__(self) -> None:
        check_counts("--frames", self.frames)
        for name in ("repeats", "compile_jobs", "steps"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)}: give a number of at least 1")
        if not 0 <= self.before < self.text:
            raise UserError(
                f"--text-tokens {self.text}: give more than {self.before}, those before the video"
            )

    @staticmethod
    def from_json(text: str) -> "Request":
        """The request that `to_json` wrote, as an instance of the same class."""
        values: Row = json.loads(text)
        module, _, name = values.pop("type").partition(":")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return getattr(importlib.import_module(module), name)(**fields)

    def to_json(self) -> str:
        """One line of JSON with the class and the fields."""
        kind = f"{type(self).__module__}:{type(self).__name__}"
        return json.dumps({"type": kind, **dataclasses.asdict(self)})

    def workload(self, frames: int) -> flops.Workload:
        """The prompt with `frames` frames."""
        return flops.Workload(frames=frames, text=self.text, before=self.before)


def check_counts(option: str, counts: Collection[int]) -> None:
    """Raises a `UserError` that names `option` if a count is below 1."""
    if min(counts, default=1) < 1:
        raise UserError(f"{option} {min(counts)}: give numbers of at least 1")


class Record:
    """Rows, facts and errors of one process, kept in a JSON file that is complete at any time."""

    def __init__(self, path: str, request: Request) -> None:
        """Starts the file `path`."""
        self._path = Path(path)
        self.request = request
        self.facts: Row = {}
        self.rows: list[Row] = []
        self.errors: list[str] = []
        self.save()

    def add_facts(self, **facts: object) -> None:
        """Notes what holds for all rows, e.g. the device and its measured rates."""
        self.facts |= facts
        self.save()

    def add_row(self, row: Row, costs: flops.Costs | None = None) -> None:
        """Adds a row and, with `costs`, its FLOPs, its rate, and the fraction of the measured matmul rate.

        The matmul rate is bfloat16's, also for rows in 8 bits, so that all rows compare; theirs may exceed 1.
        """
        row = {"system": self.request.system, **row}
        if costs is not None:
            row["model_tflop"] = flops.total(costs) / 1e12
            row["parts_tflop"] = {part: cost.total / 1e12 for part, cost in costs.items()}
            row["tflops"] = 1e3 * row["model_tflop"] / row["ms"]
            if "matmul_tflops" in self.facts:
                row["fraction_of_matmul"] = row["tflops"] / self.facts["matmul_tflops"]
        self.rows.append(row)
        self.save()
        names = ("system", "what", "frames", "precision", "ms", "peak_mb", "tflops")
        shown = {name: row[name] for name in names if name in row}
        words = [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                 for name, value in shown.items()]  # fmt: skip
        print(*words, file=sys.stderr, flush=True)

    def add_error(self, where: str, error: BaseException) -> None:
        """Notes a failure; the next case is measured all the same."""
        text = " ".join(str(error).split())
        self.errors.append(f"{self.request.system}, {where}: {type(error).__name__}: {text[:600]}")
        print(self.errors[-1], file=sys.stderr, flush=True)
        self.save()

    def save(self) -> None:
        """Replaces the file by a complete new one."""
        content = {
            "request": dataclasses.asdict(self.request),
            "facts": self.facts,
            "rows": self.rows,
            "errors": self.errors,
        }
        atomic_write(self._path, json.dumps(content).encode())
