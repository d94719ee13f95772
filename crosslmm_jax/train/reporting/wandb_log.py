"""Metrics for Weights & Biases. Account, entity and offline mode are set in its own environment variables."""

import contextlib
import errno
import importlib.util
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from crosslmm_jax.errors import UserError
from crosslmm_jax.train.reporting.metrics_log import MetricsLine, flatten_scalars

RESTART_S = 60.0  # between two starts of its process
CLOSE_S = 8.0  # that training waits at its end
END_S = 60.0  # from training's end to that of the process
ID_FILE = "wandb_id"  # in the run folder: a run that resumes goes on with the same curves


def check_wandb(project: str | None) -> None:
    """Raises a UserError if a project is named and the package is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"run.wandb is {project!r}, but the package wandb is not installed: pip install"
            " 'crosslmm_jax[wandb]', or leave run.wandb out"
        )


class WandbLog:
    """A run in a project, which a process of its own writes. Used by a side channel: it may fail or hang."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, object]) -> None:
        """Starts nothing yet. `folder` is the run's."""
        self._folder, self._project, self._config = folder, project, dict(config)
        self._process: subprocess.Popen[str] | None = None
        self._started = float("-inf")

    def begin(self) -> None:
        """Begins the run, or goes on with it; if that has failed, at most once a minute.

        Raises:
          OSError: it failed.
        """
        if self._process is not None or time.monotonic() - self._started < RESTART_S:
            return
        self._started = time.monotonic()
        path = self._folder / ID_FILE
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12])
        init = {
            "project": self._project, "name": self._folder.resolve().name, "id": path.read_text().strip(),
            "resume": "allow", "dir": str(self._folder), "config": self._config,
        }  # fmt: skip
        program = Path(__file__).with_name("wandb_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._send({"init": init, "argv": sys.argv, "parent": os.getpid(), "end_s": END_S})

    def write(self, line: MetricsLine) -> None:
        """Adds the numbers of a line; begins the run if it has not begun.

        Raises:
          OSError: it failed.
        """
        self.begin()
        if self._process is not None:
            scalars = flatten_scalars({name: value for name, value in line.items() if name != "step"})
            self._send({"step": line["step"], "scalars": scalars})

    def close(self) -> None:
        """Ends the run. What is not sent within `CLOSE_S`, the process may send within `END_S` more.

        Raises:
          OSError: there is such, or it failed.
        """
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            raise OSError(
                errno.ETIMEDOUT, f"not all is sent yet; its process goes on for up to {END_S:.0f} s"
            ) from None
        if code != 0:
            raise OSError(errno.EIO, f"its process has ended with code {code}")

    def _send(self, message: Mapping[str, object]) -> None:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            self._process = None
            raise OSError(errno.EPIPE, f"its process has ended with code {process.wait()}")
        if (error := json.loads(answer)) is not None:
            raise OSError(errno.EIO, error)
