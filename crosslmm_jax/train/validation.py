"""Loss and accuracy of held-out rows while a run trains, and which step was the best.

Sums over all targets, divided once: the numbers do not depend on the number of hosts, and hardly on the mesh.
"""

import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.data.loading import Dataset, HeldOutRows, open_held_out
from crosslmm_jax.model import Params, Scores
from crosslmm_jax.parallel import gather, row_shard, to_global
from crosslmm_jax.train.checkpoint import Best
from crosslmm_jax.train.reporting.metrics_window import MAX_QUEUED_STEPS
from crosslmm_jax.train.reporting.run_report import RunReport, Validated
from crosslmm_jax.train.step import compile_scores, with_step_visibility

_ROOM = len("false")


class Validation:
    """Validates a run every `data.validation.every` steps. Every process calls every method."""

    def __init__(self, config: ExperimentConfig, mesh: Mesh, held_out: HeldOutRows) -> None:
        """Compiles nothing yet."""
        self._config, self._mesh, self._rows = config, mesh, held_out
        self._scores = compile_scores(config.model, config.stage, mesh)

    def is_due(self, step: int) -> bool:
        """Whether there is one after this step."""
        return step == self._config.stage.steps or step % self._config.data.validation.every == 0

    def run(
        self, step: int, params: Params, report: RunReport, *, stopped: Callable[[], bool]
    ) -> tuple[Validated, Best] | None:
        """Validates after a step, whose metrics are fetched already.

        Args:
          step: number of the step.
          params: after it.
          report: says what is found.
          stopped: whether this process was asked to stop; one is enough for all to give up.

        Returns:
          What was found, and the same as a candidate for the best. None if it gave up, or without a target.
        """
        begin = time.perf_counter()
        index, count = row_shard(self._mesh)
        found: list[Scores] = []
        for number, batch in enumerate(self._rows.batches(shard_index=index, shard_count=count)):
            if number % MAX_QUEUED_STEPS == 0 and any(gather(stopped(), room=_ROOM)):
                return None
            batch = with_step_visibility(batch)
            with report.program(step, "validation", batch, is_step=False):
                found.append(self._scores(params, to_global(batch, self._mesh, num_shards=count)))
            if len(found) > MAX_QUEUED_STEPS:
                jax.block_until_ready(found[-1 - MAX_QUEUED_STEPS])
        loss, hits, weight = (sum(map(float, each)) for each in zip(*jax.device_get(found), strict=True))
        if not weight:
            return None
        seconds = time.perf_counter() - begin
        validated = Validated(loss / weight, hits / weight, round(weight), self._rows.num_rows, seconds)
        return validated, Best(step, validated.loss, self._rows.digest)


def open_validation(config: ExperimentConfig, mesh: Mesh, dataset: Dataset) -> Validation | None:
    """The validation that the config asks for; None if it asks for none. Raises like `open_held_out`."""
    held_out = open_held_out(dataset)
    return None if held_out is None else Validation(config, mesh, held_out)
