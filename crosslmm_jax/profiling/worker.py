"""One measuring process: `python -m crosslmm_jax.profiling.worker RECORD.json REQUEST`.

Each system has a process of its own, so that its memory is free before the next one starts.
"""

import importlib
import sys
from collections.abc import Sequence

from crosslmm_jax.profiling.record import Record, Request


def main(argv: Sequence[str]) -> int:
    """Runs the task that the request (JSON) names; the exit code is 1 if it ended with an error."""
    path, text = argv
    request = Request.from_json(text)
    record = Record(path, request)
    try:
        importlib.import_module(request.task).run(record)
    except Exception as error:  # the parent process reads it in the record
        record.add_error(request.task, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
