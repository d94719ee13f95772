"""Train both stages and measure the result; the control does the same in another process."""

import dataclasses
import multiprocessing
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection

from crosslmm_jax.config import DataConfig, ExperimentConfig
from crosslmm_jax.demo.figure import MetricsLines
from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import end_with_parent


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model that was trained in both stages and evaluated."""

    model: str  # MODEL folder
    accuracy: float  # share of the held-out questions that are answered exactly
    num_questions: int
    metrics: list[MetricsLines]  # one entry per stage
    seconds: dict[str, float]  # phase -> wall time
    reused: bool  # trained, wholly or in part, by an earlier call


def train_and_evaluate(
    stages: Sequence[ExperimentConfig], heldout: DataConfig, *, quiet: bool = False
) -> TrainedModel:
    """Trains `stages` one after the other and asks the last model the `heldout` questions.

    A stage that an earlier call finished is not trained again. One that it began resumes.
    """
    from crosslmm_jax.demo.evaluate import answered_exactly
    from crosslmm_jax.train import train

    results, seconds = [], {}
    for config in stages:
        begin = time.perf_counter()
        results.append(train(config, quiet=quiet))
        seconds[config.stage.name] = time.perf_counter() - begin
    begin = time.perf_counter()
    exact = answered_exactly(results[-1].model_folder, heldout)
    seconds["evaluation"] = time.perf_counter() - begin
    return TrainedModel(
        model=str(results[-1].model_folder),
        accuracy=float(exact.mean()),
        num_questions=len(exact),
        metrics=[result.metrics for result in results],
        seconds=seconds,
        reused=any(result.resumed_step > 0 for result in results),
    )


class InBackground:
    """`train_and_evaluate` in another process: the steps of a tiny model keep only one core busy.

    A context manager. Leaving it with an error stops the process; the same command resumes its training.
    """

    def __init__(self, stages: Sequence[ExperimentConfig], heldout: DataConfig) -> None:
        """Starts the process."""
        context = multiprocessing.get_context("spawn")  # jax does not support fork
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_run_and_send, args=(sender, stages, heldout), daemon=True)
        self._process.start()
        sender.close()  # only the process has a copy now, so that `recv` fails if it dies

    def result(self) -> TrainedModel:
        """Waits for the result.

        Raises:
          UserError: that is how the process ended.
          RuntimeError: it failed in another way.
        """
        try:
            kind, value = self._receiver.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"training the control ended with code {self._process.exitcode}") from None
        if kind == "user error":
            raise UserError(value)
        if kind == "failure":
            raise RuntimeError(f"training the control failed:\n{value}")
        return value

    def __enter__(self) -> "InBackground":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.is_alive() and any(error):
            self._process.terminate()
        self._process.join()
        self._receiver.close()


def _run_and_send(sender: Connection, stages: Sequence[ExperimentConfig], heldout: DataConfig) -> None:
    end_with_parent()  # checkpoints stay valid when the process is killed at any moment
    try:
        sender.send(("result", train_and_evaluate(stages, heldout, quiet=True)))
    except UserError as error:
        sender.send(("user error", str(error)))
    except KeyboardInterrupt:
        pass  # the parent reports it
    except Exception:
        sender.send(("failure", traceback.format_exc()))
    finally:
        sender.close()
