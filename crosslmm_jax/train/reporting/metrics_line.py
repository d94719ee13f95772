"""One line of metrics.jsonl out of what the processes say of the steps since the line before."""

from collections.abc import Sequence

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.train.optimizer import learning_rates
from crosslmm_jax.train.reporting.hosts import HostShare, added
from crosslmm_jax.train.reporting.metrics_log import MetricsLine
from crosslmm_jax.train.reporting.metrics_window import Window

_NOTABLE_SHARE = 0.05  # of the time of a step
_SLOW = 2.0  # times the median step
_SLOW_S = 1.0  # seconds over the median step


def metrics_line(
    step: int,
    window: Window,
    shares: Sequence[HostShare],
    *,
    config: ExperimentConfig,
    names: Sequence[str],
    num_devices: int,
    peak_tflops: float | None,
) -> MetricsLine:
    """The metrics of a window; docs/watching_a_run.md has each name, its meaning and unit.

    Args:
      step: the last one of the window.
      window: as process 0 saw it.
      shares: of all processes.
      config: the experiment.
      names: host name of each process.
      num_devices: of all processes.
      peak_tflops: 10^12 FLOPs per second of a device at most; None if that is not known.
    """
    phases, steps = window.phases, window.steps
    aside = phases.get("checkpoint", 0.0) + phases.get("validation", 0.0)
    seconds = max(window.seconds - aside, 1e-9)
    input_wait = max(share["input_wait"] for share in shares)
    compiling = phases.get("compile", 0.0)
    tflops = sum(share["flops"] for share in shares) / seconds / num_devices / 1e12
    line: MetricsLine = {
        "step": step, "loss": window.loss, "grad_norm": window.grad_norm, "targets": window.targets,
        "step_seconds": seconds / steps,
        "input_wait_seconds": input_wait / steps,
        "input_wait_share": min(input_wait / seconds, 1.0),
        "compute_seconds": max(seconds - input_wait - compiling, 0.0) / steps,
        "compile_seconds": compiling,
        "checkpoint_seconds": phases.get("checkpoint", 0.0),
        "validation_seconds": phases.get("validation", 0.0),
        "paused_seconds": max(share["paused"] for share in shares),
        "tokens_per_second": window.work.tokens / seconds,
        "targets_per_second": window.total_targets / seconds,
        "frames_per_second": window.work.frames / seconds,
        "model_tflops_per_device": tflops,
    }  # fmt: skip
    if peak_tflops is not None:
        line["model_flops_utilisation"] = tflops / peak_tflops
    if memory := [share["device_memory_gb"] for share in shares if share["device_memory_gb"] is not None]:
        line["device_memory_peak_gb"] = max(memory)
    line["host_memory_peak_gb"] = max(share["host_memory_gb"] for share in shares)
    line["slowest_step"] = _slowest_step(window, shares, names)
    if len(shares) > 1:
        line |= _by_host(shares, names, steps)
    line["faults"] = added([share["faults"] for share in shares])
    line["truncated"] = added([share["truncated"] for share in shares])
    line["learning_rate"] = learning_rates(config.model, config.stage, step - 1)
    line["gate"] = {
        direction: {
            str(layer): float(gate)
            for layer, gate in zip(config.model.cross_attention_layers, values, strict=True)
        }
        for direction, values in window.gate.items()
    }
    return line


def _slowest_step(window: Window, shares: Sequence[HostShare], names: Sequence[str]) -> dict[str, object]:
    """The step that took longest, by phase, and the process that the others waited for."""
    step, times = window.slowest
    found: dict[str, object] = {"step": step, "seconds": times.total}
    found |= {f"{name}_seconds": seconds for name, seconds in times.phases.items()}
    if times.work.tokens:  # else only its checkpoint or validation is in this window
        found |= {"frames": times.shape[0], "text_tokens": times.shape[1]}
    found["median_seconds"] = window.median
    own_times = [
        (share["longest"][1], process, share["longest"][2])
        for process, share in enumerate(shares)
        if share["longest"][0] == step
    ]
    if len(shares) > 1 and own_times:
        own, process, wait = max(own_times)
        found |= {"process": process, "host": names[process], "own_seconds": own}
        found["input_wait_seconds"] = max(wait, times.phases.get("input_wait", 0.0))
    return found


def _by_host(shares: Sequence[HostShare], names: Sequence[str], steps: int) -> MetricsLine:
    """Lists with one number per process, and the process that made the others wait longest."""
    late = [max(share["own"], share["paused"]) / steps for share in shares]
    slowest = max(range(len(shares)), key=late.__getitem__)
    return {
        "hosts": {
            "input_wait_seconds": [share["input_wait"] / steps for share in shares],
            "own_seconds": [share["own"] / steps for share in shares],
            "paused_seconds": [share["paused"] for share in shares],
            "device_memory_peak_gb": [share["device_memory_gb"] for share in shares],
            "host_memory_peak_gb": [share["host_memory_gb"] for share in shares],
            "bad_rows": [sum(share["faults"].values()) for share in shares],
        },
        "slowest_host": {
            "process": slowest, "host": names[slowest], "own_seconds": late[slowest],
            "others_wait_seconds": late[slowest] - sorted(late)[-2],
            "input_wait_seconds": shares[slowest]["input_wait"] / steps,
            "paused_seconds": shares[slowest]["paused"],
        },
    }  # fmt: skip


def note_of(line: MetricsLine) -> str:
    """A line of metrics for people, in a few words: only what is worth a look."""
    parts = [
        f"loss {line['loss']:.4f}", f"{line['step_seconds'] * 1e3:.0f} ms/step",
        f"{_short(line['tokens_per_second'])} tokens/s",
    ]  # fmt: skip
    if "model_flops_utilisation" in line:
        parts.append(f"{line['model_flops_utilisation']:.0%} of peak FLOPs")
    if line["input_wait_share"] > _NOTABLE_SHARE:
        parts.append(f"input wait {line['input_wait_share']:.0%}")
    slowest = line.get("slowest_host")
    if slowest and slowest["others_wait_seconds"] > _NOTABLE_SHARE * line["step_seconds"]:
        where = f"process {slowest['process']} on {slowest['host']}"
        paused = f", which did not run for {slowest['paused_seconds']:.1f} s"
        parts.append(f"slowest: {where}{paused if slowest['paused_seconds'] else ''}")
    if reason := _why_slow(line["slowest_step"]):
        parts.append(reason)
    return "  ".join(parts)


def _why_slow(slowest: dict[str, float]) -> str:
    """Why a step took much longer than the others; nothing if none did, or if it was compiled."""
    seconds, median = slowest["seconds"], slowest["median_seconds"]
    if seconds < _SLOW * median or seconds - median < _SLOW_S:
        return ""
    own = slowest.get("own_seconds", 0.0)
    causes = {
        "compiling": slowest.get("compile_seconds", 0.0),
        "of input wait": slowest.get("input_wait_seconds", 0.0),
        "of checkpoint": slowest.get("checkpoint_seconds", 0.0),
        "of validation": slowest.get("validation_seconds", 0.0),
        "of its own work": own - slowest.get("input_wait_seconds", 0.0),
        "of waiting for the devices": slowest.get("device_wait_seconds", 0.0) - own,
    }
    cause = max(causes, key=causes.__getitem__)
    if cause in ("compiling", "of validation", "of checkpoint") and causes[cause] > seconds / 2:
        return ""  # a line of its own says so
    said = f"step {slowest['step']} took {seconds:.1f} s"
    if causes[cause] > (seconds - median) / 2:
        said += f", {causes[cause]:.1f} s {cause}"
        if "process" in slowest and cause in ("of input wait", "of its own work"):
            said += f" on process {slowest['process']} ({slowest['host']})"
    return said


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
