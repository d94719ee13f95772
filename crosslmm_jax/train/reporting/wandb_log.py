"""Metrics for Weights & Biases. Account, entity and offline mode are set in its own environment variables."""

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path

from crosslmm_jax.errors import UserError
from crosslmm_jax.train.reporting.metrics_log import MetricsLine, flatten_scalars

ID_FILE = "wandb_id"  # in the run folder: a run that resumes goes on with the same curves


def check_wandb(project: str | None) -> None:
    """Raises a UserError if a project is named and the package is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"run.wandb is {project!r}, but the package wandb is not installed: pip install"
            " 'crosslmm_jax[wandb]', or leave run.wandb out"
        )


class WandbLog:
    """A run in a project. Used by a side channel: it may fail or hang."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, object]) -> None:
        """Begins the run of `folder`, or goes on with it."""
        import wandb  # type: ignore[import-not-found]  # an extra

        path = folder / ID_FILE
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project, name=folder.resolve().name, id=path.read_text().strip(), resume="allow",
            dir=str(folder), config=dict(config),
        )  # fmt: skip

    def write(self, line: MetricsLine) -> None:
        """Adds the numbers of a line."""
        scalars = flatten_scalars({name: value for name, value in line.items() if name != "step"})
        self._run.log(scalars, step=line["step"])

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()
