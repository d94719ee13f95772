"""`crosslmm profile`: one process per system, one after the other, and their rows as one report.

This process never touches the device, so each system has all of it.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from crosslmm_jax.config import Precision
from crosslmm_jax.errors import UserError
from crosslmm_jax.parallel import xla_flags
from crosslmm_jax.profiling import figure
from crosslmm_jax.profiling.inputs import config_of
from crosslmm_jax.profiling.record import Request, Row
from crosslmm_jax.profiling.report import Report, markdown, new_report
from crosslmm_jax.utils import kill_with_parent

# The allocator that keeps a high-water mark, with up to nearly all of the device. It takes memory as it is
# needed, unless a request preallocates: regions that are added one by one for growing cases leave no room
# for a large temporary.
ALLOCATOR = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "bfc",
}
FIGURES = (".png", ".svg", ".pdf")


class Outputs(NamedTuple):
    """Files that a report is written to; None: not written."""

    json: str | None = None  # "-": printed in place of the page
    markdown: str | None = None
    figure: str | None = None


class Presentation(NamedTuple):
    """How a report becomes files; a caller may add to each."""

    fields: Callable[[Report], Row] = dict  # what the JSON file holds
    page: Callable[[Report], str] = markdown
    draw: Callable[[Report, str], None] = figure.draw


PLAIN = Presentation()


def requests_for(
    make: Callable[..., Request],
    presets: Sequence[str],
    *,
    tokens_per_frame: Sequence[int | None] = (None,),
    precisions: Sequence[Precision] = ("compute",),
) -> list[Request]:
    """`make(...)` for each preset, number of tokens per frame and precision.

    Raises:
      UserError: an unknown preset, or a model that cannot be built.
    """
    variants = itertools.product(presets, tokens_per_frame, precisions)
    requests = [
        make(system=name, tokens_per_frame=count, precision=precision) for name, count, precision in variants
    ]
    for request in requests:
        config_of(request)
    return requests


def profile(
    task: str,
    requests: Sequence[Request],
    *,
    command: str,
    outputs: Outputs,
    presentation: Presentation = PLAIN,
    timeout: float | None = None,
) -> Report:
    """Measures all systems and writes the report again after each one.

    Args:
      task: title of the report.
      requests: one per process, in this order.
      command: the command line, for the report.
      outputs: files to write.
      presentation: how they are made.
      timeout: seconds that one system may take; the rows that it has by then are kept.

    Raises:
      UserError: nothing to measure, or a file that cannot be written.
    """
    if not requests:
        raise UserError("nothing to measure; give --preset crosslmm_2b")
    report = new_report(task, command=command)
    write_report(report, outputs, presentation)
    for request in requests:
        found = _measure(request, timeout)
        report["systems"].append({"system": request.system, **found["facts"], "request": found["request"]})
        report["rows"] += found["rows"]
        report["errors"] += found["errors"]
        if report["matmul_tflops"] is None:
            report["matmul_tflops"] = found["facts"].get("matmul_tflops")
        write_report(report, outputs, presentation)
    print(
        json.dumps(presentation.fields(report), indent=1)
        if outputs.json == "-"
        else presentation.page(report)
    )
    return report


def _measure(request: Request, timeout: float | None) -> Row:
    """The record of the process that measures one system."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    preallocate = {"XLA_PYTHON_CLIENT_PREALLOCATE": str(request.preallocate).lower()}
    allocator = {} if request.users_allocator else ALLOCATOR | preallocate
    environment = {**allocator, **os.environ, "PYTHONPATH": path}
    xla_flags.apply(environment)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "crosslmm_jax.profiling.worker", str(record), request.to_json()]
        failure = None
        try:
            code = subprocess.run(
                command, env=environment, timeout=timeout, check=False, preexec_fn=kill_with_parent
            ).returncode
            if code not in (0, 1):  # 1: the record says why
                failure = f"{request.system}: the measuring process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            failure = f"{request.system}: stopped after {timeout:g} s"
        empty = {"request": dataclasses.asdict(request), "facts": {}, "rows": [], "errors": []}
        found = json.loads(record.read_text()) if record.exists() else empty
    if failure is not None:
        found["errors"].append(failure)
        print(failure, file=sys.stderr, flush=True)
    elif not found["rows"] and not found["errors"]:
        found["errors"].append(f"{request.system}: the measuring process recorded nothing")
    return found


def write_report(report: Report, outputs: Outputs, presentation: Presentation) -> None:
    """Writes the files that `outputs` names; a figure only once there is a row.

    Raises:
      UserError: a file that cannot be written, other than the figure.
    """
    if outputs.figure is not None and Path(outputs.figure).suffix not in FIGURES:
        raise UserError(f"--figure {outputs.figure}: end the name in {', '.join(FIGURES)}")
    texts = {
        outputs.json: json.dumps(presentation.fields(report), indent=1),
        outputs.markdown: presentation.page(report),
    }
    target = None
    try:
        for target, text in texts.items():
            if target is not None and target != "-":
                Path(target).write_text(text + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{target}: {reason}; give a file in a folder that can be written") from error
    if outputs.figure is not None and report["rows"]:
        _draw(report, outputs.figure, presentation)


def _draw(report: Report, path: str, presentation: Presentation) -> None:
    """Draws the figure, or says once why not: what was measured matters more."""
    try:
        presentation.draw(report, path)
    except OSError as error:
        problem = f"{path}: the figure is not written ({error.strerror or error})"
        if problem not in report["errors"]:
            report["errors"].append(problem)
            print(problem, file=sys.stderr, flush=True)
