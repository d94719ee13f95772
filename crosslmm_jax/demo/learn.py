"""Train both stages and measure the result; the control does the same in a process of its own."""

import dataclasses
import multiprocessing
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from crosslmm_jax.config import DataConfig, ExperimentConfig
from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import end_with_parent


@dataclasses.dataclass(frozen=True)
class Learned:
    """A model that went through both stages."""

    model: str  # MODEL folder
    accuracy: float  # share of the held-out questions that are answered exactly
    num_questions: int
    metrics: list[list[dict[str, Any]]]  # of each stage, the lines of metrics.jsonl
    seconds: dict[str, float]  # phase -> wall time
    reused: bool  # trained, wholly or in part, by an earlier call


def learn(stages: Sequence[ExperimentConfig], heldout: DataConfig, *, quiet: bool = False) -> Learned:
    """Trains `stages` one after the other and asks the last model the `heldout` questions.

    A stage that an earlier call finished is not trained again; one that it began goes on.
    """
    from crosslmm_jax.demo.evaluate import answered_exactly
    from crosslmm_jax.train import train

    results, seconds = [], {}
    for config in stages:
        begin = time.perf_counter()
        results.append(train(config, quiet=quiet))
        seconds[config.stage.name] = time.perf_counter() - begin
    begin = time.perf_counter()
    right = answered_exactly(results[-1].model_folder, heldout)
    seconds["evaluation"] = time.perf_counter() - begin
    return Learned(
        model=str(results[-1].model_folder),
        accuracy=float(right.mean()),
        num_questions=len(right),
        metrics=[result.metrics for result in results],
        seconds=seconds,
        reused=any(result.resumed_step > 0 for result in results),
    )


class BackgroundLearner:
    """`learn` in another process: steps of a tiny model keep one core busy, and there are two.

    A context manager: leaving it early stops the process, whose training the same command continues later.
    """

    def __init__(self, stages: Sequence[ExperimentConfig], heldout: DataConfig) -> None:
        """Starts at once."""
        context = multiprocessing.get_context("spawn")  # jax cannot be forked
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_learn_and_send, args=(sender, stages, heldout), daemon=True)
        self._process.start()
        sender.close()  # the process's copy is the only one, so that its death ends `result`

    def result(self) -> Learned:
        """Waits for it. Raises UserError when that is how it ended there."""
        try:
            kind, value = self._receiver.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"training the control ended with code {self._process.exitcode}") from None
        if kind == "mistake":
            raise UserError(value)
        if kind == "failure":
            raise RuntimeError(f"training the control failed:\n{value}")
        return value

    def __enter__(self) -> "BackgroundLearner":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.is_alive() and any(error):
            self._process.terminate()
        self._process.join()
        self._receiver.close()


def _learn_and_send(sender: Connection, stages: Sequence[ExperimentConfig], heldout: DataConfig) -> None:
    end_with_parent()  # checkpoints bear a sudden end
    try:
        sender.send(("learned", learn(stages, heldout, quiet=True)))
    except UserError as error:
        sender.send(("mistake", str(error)))
    except KeyboardInterrupt:
        pass  # the other process says what happened
    except Exception:
        sender.send(("failure", traceback.format_exc()))
    finally:
        sender.close()
