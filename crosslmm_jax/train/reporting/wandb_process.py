"""Hands metrics to Weights & Biases. A program, which `WandbLog` starts: it imports nothing of this package.

Each line of standard input is JSON: first what begins the run, then {"step", "scalars"}. Each is answered by
a line on standard output: null, or why it failed. The end of standard input ends the run.

A process of its own, because wandb waits for its service when a process exits, for ever if that hangs.
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any, TextIO


def main() -> None:
    """Serves the parent until it closes its end of the pipe, or has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler sends them to all processes of a job
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever wandb prints is for people
    lines = iter(sys.stdin)
    start = json.loads(next(lines))
    sys.argv = start["argv"]
    ends = (start["parent"], start["end_s"])
    threading.Thread(target=_end_after_parent, args=ends, daemon=True).start()
    run: Any = None
    try:
        import wandb  # type: ignore[import-not-found]  # an extra

        # The parent's processes are what it measures.
        settings = wandb.Settings(console="off", x_stats_pid=start["parent"])
        run = wandb.init(**start["init"], settings=settings)
        _answer(answers, None)
        for line in lines:
            message = json.loads(line)
            try:
                run.log(message["scalars"], step=message["step"])
                _answer(answers, None)
            except Exception as error:  # the next line may succeed
                _answer(answers, error)
    except Exception as error:
        _answer(answers, error)
    if run is not None:
        try:
            run.finish()
        except Exception:  # the parent says so; a traceback of wandb's own hooks would add nothing
            os._exit(1)


def _end_after_parent(parent: int, seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(seconds)
    os._exit(1)


def _answer(answers: TextIO, error: Exception | None) -> None:
    reason = (error.strerror if isinstance(error, OSError) else None) or repr(error)
    answers.write(json.dumps(None if error is None else reason) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
