"""A run's curves in a terminal, from the files in its folder. Needs no jax, and no part of the run."""

import contextlib
import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crosslmm_jax.errors import UserError
from crosslmm_jax.train.reporting.json_lines import JsonLine
from crosslmm_jax.train.reporting.metrics_log import METRICS_FILE, flatten_scalars, read_metrics
from crosslmm_jax.train.reporting.run_log import LOG_FILE, read_log

if TYPE_CHECKING:
    from rich.console import Console

Curve = list[tuple[int, float]]  # (step, value)

_SILENT_S = 60.0  # twelve heartbeats, and some difference between clocks
_LEVELS = "▁▂▃▄▅▆▇█"
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, by row and column
_CHARTS = {"loss": "loss", "validation/loss": "validation loss", "validation/accuracy": "validation accuracy"}
_ROWS = {  # metric -> what a row is called, and how its numbers are written
    "loss": ("loss", ".4f"), "validation/loss": ("validation loss", ".4f"),
    "validation/accuracy": ("validation accuracy", ".1%"), "grad_norm": ("gradient norm", ".3g"),
    "step_seconds": ("seconds per step", ".3g"), "input_wait_share": ("input wait", ".1%"),
    "tokens_per_second": ("tokens per second", ",.0f"), "frames_per_second": ("frames per second", ",.1f"),
    "model_flops_utilisation": ("of peak FLOPs", ".1%"), "device_memory_peak_gb": ("device memory GB", ".1f"),
    "learning_rate/base": ("learning rate", ".2e"),
}  # fmt: skip


def watch(run: str | Path, *, follow: bool, every_s: float = 2.0, console: "Console | None" = None) -> None:
    """Shows the curves of a run.

    Args:
      run: folder of the run, `run.out` of its config.
      follow: draw anew until the run has ended, or Ctrl-C. Otherwise once.
      every_s: seconds between two looks at the files.
      console: where to; None: stdout.

    Raises:
      UserError: the folder holds no run.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    folder, console = Path(run), console or Console()
    if not folder.is_dir():
        raise UserError(f"{run}: no such folder; give the folder of a run, as run.out of its config")
    if not ((folder / METRICS_FILE).exists() or (folder / LOG_FILE).exists()):
        raise UserError(f"{run}: holds no {METRICS_FILE}; give the folder of a run, as run.out of its config")
    if follow and not _has_ended(folder):

        def draw() -> Text:
            return Text("\n".join(_page(folder, width=console.width, charts=True)), no_wrap=True)

        live = Live(draw(), console=console, auto_refresh=False, transient=True)
        with contextlib.suppress(KeyboardInterrupt), live:
            while not _has_ended(folder):
                time.sleep(every_s)
                live.update(draw(), refresh=True)
    print_plainly(console, folder)


def print_plainly(console: "Console", folder: Path) -> None:
    """Prints the page once; charts only on a terminal."""
    for line in _page(folder, width=min(console.width, 100), charts=console.is_terminal):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _has_ended(folder: Path) -> bool:
    return not (folder / "owner.json").exists() and (folder / "model" / "config.json").exists()


def _silence(folder: Path) -> float | None:
    """Seconds since the last heartbeat of the run; None if no process owns the folder."""
    try:
        return time.time() - (folder / "owner.json").stat().st_mtime
    except OSError:
        return None


def _page(folder: Path, *, width: int, charts: bool) -> list[str]:
    lines, events = read_metrics(folder), read_log(folder)
    page = [*_head(folder, lines, events), ""]
    if not lines:
        return [*page, "no step is reported yet"]
    curves = _curves(lines)
    if charts:
        for name, title in _CHARTS.items():
            if len(curves.get(name, [])) > 1:
                page += [title, *_chart(curves[name], width=min(width, 100) - 10, height=8), ""]
    shown = {name: row for name, row in _ROWS.items() if name in curves}
    shown |= {name: (name.replace("/", " "), ".4f") for name in curves if name.startswith("gate/")}
    for name, (title, form) in shown.items():
        values = [value for _, value in curves[name]]
        page.append(f"{title:<20}{values[-1]:>12{form}}  {_spark(values, max(width - 36, 10))}")
    return page + _notes(lines, events)


def _head(folder: Path, lines: Sequence[JsonLine], events: Sequence[JsonLine]) -> list[str]:
    """Which run this is, where it is, and whether it goes on."""
    starts = [event for event in events if event["event"] == "start"]
    step = lines[-1]["step"] if lines else 0
    if not starts:
        return [f"{folder}: step {step}"]
    start, steps = starts[-1], starts[-1]["steps"]
    if _has_ended(folder):
        state = "finished"
    elif (silent := _silence(folder)) is not None and silent > _SILENT_S:
        state = f"without a sign of life for {datetime.timedelta(seconds=round(silent))}"
    elif silent is not None:
        left = (steps - step) * lines[-1]["step_seconds"] if lines else 0.0
        state = f"running, about {datetime.timedelta(seconds=round(left))} left" if lines else "running"
    else:
        state = "stopped; the same command resumes"
    mesh = " ".join(f"{name}={size}" for name, size in start["mesh"].items())
    hosts = list(dict.fromkeys(start["hosts"]))
    where = ", ".join(hosts[:8]) + (", ..." if len(hosts) > 8 else "")
    processes = f"{len(start['hosts'])} process{'es' * (len(start['hosts']) != 1)}"
    total, trainable = start["parameters"]["total"], start["parameters"]["trainable"]
    return [
        f"{folder}: {start['stage']}, step {step} of {steps}, {state}",
        f"{sum(start['devices'])} x {start['device_kind']}, mesh {mesh}; {processes} on {where}",
        f"{total:,} parameters, {trainable:,} trainable; last start after step {start['resumed_step']},"
        f" {start['time'][:19].replace('T', ' ')} UTC",
    ]


def _notes(lines: Sequence[JsonLine], events: Sequence[JsonLine]) -> list[str]:
    """What is worth a look: the best step, the slowest steps, waits for one process, bad rows."""
    notes = []
    if best := [event for event in events if event["event"] == "validated" and event["best"]]:
        notes.append(f"best validation loss {best[-1]['loss']:.4f}, after step {best[-1]['step']}")
    slow = [line["slowest_step"] for line in lines if "slowest_step" in line]
    slow = [each for each in slow if each["seconds"] > 2 * each["median_seconds"]]
    for each in sorted(slow, key=lambda each: -each["seconds"])[:3]:
        phases = {name: seconds for name, seconds in each.items() if name.endswith("_seconds")}
        phases.pop("median_seconds")
        cause = max(phases, key=phases.__getitem__)
        where = f" on process {each['process']} ({each['host']})" if "process" in each else ""
        notes.append(
            f"step {each['step']} took {each['seconds']:.1f} s: {cause.removesuffix('_seconds')}"
            f" {phases[cause]:.1f} s{where}"
        )
    if "slowest_host" in lines[-1]:
        host = lines[-1]["slowest_host"]
        notes.append(
            f"slowest: process {host['process']} on {host['host']}; the others wait"
            f" {host['others_wait_seconds']:.3g} s per step for it"
        )
    bad: dict[str, int] = {}
    for line in lines:
        for reason, count in line.get("faults", {}).items():
            bad[reason] = bad.get(reason, 0) + count
    if bad:
        notes.append("rows replaced: " + ", ".join(f"{count} {reason}" for reason, count in bad.items()))
    return ["", *notes] if notes else []


def _curves(lines: Sequence[JsonLine]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for line in lines:
        for name, value in flatten_scalars(line).items():
            curves.setdefault(name, []).append((line["step"], value))
    return curves


def _binned(values: Sequence[float], count: int) -> list[float]:
    """At most `count` values: means of neighbours."""
    if len(values) <= count:
        return list(values)
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _spark(values: Sequence[float], width: int) -> str:
    """A curve in one line of text."""
    values = _binned(values, width)
    low, high = min(values), max(values)
    if not high > low:
        return _LEVELS[0] * len(values)
    return "".join(_LEVELS[min(int((value - low) / (high - low) * 8), 7)] for value in values)


def _chart(curve: Curve, *, width: int, height: int) -> list[str]:
    """A curve over steps, with the largest and the smallest value at its left, in `height` lines."""
    columns = max(2 * width, 2)
    first, last = curve[0][0], curve[-1][0]
    low, high = min(value for _, value in curve), max(value for _, value in curve)
    cells = [[0] * width for _ in range(height)]
    for step, value in curve:
        x = round((step - first) / max(last - first, 1) * (columns - 1))
        y = round((high - value) / (high - low or 1) * (4 * height - 1))
        cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    labels = [f"{high:>9.4g} ", *[" " * 10] * (height - 2), f"{low:>9.4g} "]
    drawn = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    return [label + row for label, row in zip(labels, drawn, strict=True)] + [
        " " * 10 + f"{first:<{width // 2}}{last:>{width - width // 2}}"
    ]
