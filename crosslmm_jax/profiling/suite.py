"""`crosslmm profile`: one process a system, one after the other, and what they found as one report.

This process never touches the device, so each system has all of it.
"""

import ctypes
import dataclasses
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosslmm_jax.config import Precision
from crosslmm_jax.errors import UserError
from crosslmm_jax.parallel import xla_flags
from crosslmm_jax.presets import get_preset
from crosslmm_jax.profiling.inputs import config_of
from crosslmm_jax.profiling.record import Request
from crosslmm_jax.profiling.report import markdown, new_report, with_bars
from perf import peers

# By the allocator that counts, since its high-water mark is to be read, and up to nearly all of the device.
# Memory is taken as it is needed, but for tasks whose temporaries take half of it: regions that are added one
# by one for growing cases leave no room in one piece.
ALLOCATOR = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.94",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "bfc",
}
IN_ONE_PIECE = ("train", "long_video", "scaling")
IN_8_BITS = ("encoder", "prefill", "decode")  # tasks that take --precision
CHOICES = {
    "v2v_scopes": ("--v2v-scope", ("prefill", "long_video")),
    "remats": ("--remat", ("train",)),
    "parts": ("--parts", ("attention",)),
    "devices": ("--devices", ("scaling",)),
}
FIGURES = (".png", ".svg", ".pdf")
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a report goes; None: nowhere."""

    json: str | None = None
    markdown: str | None = None
    figure: str | None = None


def profile(
    task: str,
    *,
    presets: Sequence[str],
    peer_names: Sequence[str],
    tokens_per_frame: Sequence[int | None],
    precisions: Sequence[Precision] = ("compute",),
    options: dict[str, Any],
    outputs: Outputs,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Measures all systems and writes the report anew after each one.

    Args:
      task: one of `arguments.TASKS`.
      presets: ours, first.
      peer_names: those of `peers`, behind ours.
      tokens_per_frame: of ours; each preset is measured with each; None is the preset's own.
      precisions: likewise.
      options: further fields of `Request`.
      outputs: files to write.
      timeout: seconds that one system may take; what it has by then is kept.

    Raises:
      UserError: nothing to measure, an unknown name, or a file that cannot be written.
    """
    if outputs.figure is not None and Path(outputs.figure).suffix not in FIGURES:
        raise UserError(f"--figure {outputs.figure}: end the name in {', '.join(FIGURES)}")
    if outputs.figure is not None and task == "precision":
        raise UserError("--figure with precision: leave it out, there is no time or memory to draw")
    requests = _requests(
        task, presets, peer_names, tokens_per_frame=tokens_per_frame, precisions=precisions, options=options
    )
    report = new_report(task, command=shlex.join(["crosslmm", *sys.argv[1:]]))
    _write(report, outputs)
    for request in requests:
        found = _measure(request, timeout)
        facts = {**found["facts"], "request": found["request"]}
        report["systems"].append({"system": request.system, **facts})
        report["rows"] += found["rows"]
        report["errors"] += found["errors"]
        _write(report, outputs)
    print(markdown(with_bars(report)))
    return report


def _requests(
    task: str, presets: Sequence[str], peer_names: Sequence[str], *, tokens_per_frame: Sequence[int | None],
    precisions: Sequence[Precision], options: dict[str, Any],
) -> list[Request]:  # fmt: skip
    """One request a process; mistakes show before the first one starts."""
    if not presets and not peer_names:
        raise UserError("nothing to measure; give --preset crosslmm_2b, or --peer")
    for name in ("frames", "devices", "parts"):
        if any(count < 1 for count in options.get(name, ())):
            raise UserError(f"--{name} {min(options[name])}: give numbers of at least 1")
    for name in ("repeats", "compile_jobs", "steps"):
        if options.get(name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} {options[name]}: give a number of at least 1")
    if not 0 <= options.get("before", 16) < options.get("text", 64):
        raise UserError(
            f"--text-tokens {options['text']}: give more than {Request.before}, those before the video"
        )
    if task not in IN_8_BITS and any(precision != "compute" for precision in precisions):
        raise UserError(f"--precision with {task}: give it with {', '.join(IN_8_BITS)}")
    for name, (option, tasks) in CHOICES.items():
        if options.get(name) and task not in tasks:
            raise UserError(f"{option} with {task}: give it with {', '.join(tasks)}")
    if (task == "precision") != (options.get("videos") is not None):
        raise UserError("--videos DIR: give it with the task precision, and only with it")
    ours = []
    for name in presets:
        get_preset(name)
        for count, precision in itertools.product(tokens_per_frame, precisions):
            ours.append(
                Request(task=task, system=name, tokens_per_frame=count, precision=precision, **options)
            )
            config_of(ours[-1])
    for name in peer_names:
        peers.check(name, task)
    return ours + [Request(task=task, system=name, **options) for name in peer_names]


def _measure(request: Request, timeout: float | None) -> dict[str, Any]:
    """What the process of one system recorded."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    in_one_piece = str(request.task in IN_ONE_PIECE).lower()
    environment = {
        **ALLOCATOR, "XLA_PYTHON_CLIENT_PREALLOCATE": in_one_piece, **os.environ, "PYTHONPATH": path,
    }  # fmt: skip
    xla_flags.apply(environment)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", "crosslmm_jax.profiling.worker", str(record), request.to_json()]
        failure = None
        try:
            code = subprocess.run(
                command, env=environment, timeout=timeout, check=False, preexec_fn=_end_with_parent
            ).returncode  # fmt: skip
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


def _end_with_parent() -> None:
    """Has Linux kill this process when the one that started it ends, however: it would keep the device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _write(report: dict[str, Any], outputs: Outputs) -> None:
    """The report in all its forms."""
    finished = with_bars(report)
    texts = {outputs.json: json.dumps(finished, indent=1), outputs.markdown: markdown(finished)}
    target = None
    try:
        for target, text in texts.items():
            if target is not None:
                Path(target).write_text(text + "\n")
        target = outputs.figure
        if target is not None and report["rows"]:
            from perf import figure, figure_long_video

            chosen = figure_long_video if report["task"] == "long_video" else figure
            chosen.draw(finished, target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{target}: {reason}; give a file in a folder that can be written") from error
