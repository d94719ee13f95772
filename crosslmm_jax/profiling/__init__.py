"""What users measure: parameters, FLOPs, memory, the time of prefill, decode, train step, encoder, answer.

| file | holds |
|---|---|
| `params.py` | parameters by part and by stage |
| `plan.py` | memory, traffic and time of a training step on devices that are not here |
| `tasks/` | one module for each task, whose `run(record)` measures |
| `inputs.py` | random weights and prompts at real size |
| `cases.py` | compiles a list of programs and measures one after the other |
| `timing.py`, `memory.py` | clocks, rates of the device, peak memory |
| `collectives.py` | what a compiled program moves between devices, read off its text |
| `record.py`, `worker.py` | what one measuring process is asked and finds, and that process |
| `suite.py` | `profile`: one process per system, and their rows as one report |
| `report.py`, `figure.py` | the report as JSON, page and figure |

To measure something else, write a module with `run(record)` and give its dotted name to `profile` as
`Request.task`; options of its own are fields of a subclass of `Request`. `perf/` does so.
"""

from crosslmm_jax.profiling import figure, inputs, memory, params, plan, report, timing
from crosslmm_jax.profiling.cases import Case, run_cases
from crosslmm_jax.profiling.record import Record, Request, Row, check_counts
from crosslmm_jax.profiling.report import Report
from crosslmm_jax.profiling.suite import Outputs, Presentation, profile, requests_for, write_report
from crosslmm_jax.profiling.tasks import ask
from crosslmm_jax.profiling.tasks.ask import AskRequest

__all__ = [
    "AskRequest", "Case", "Outputs", "Presentation", "Record", "Report", "Request", "Row", "ask",
    "check_counts", "figure", "inputs", "memory", "params", "plan", "profile", "report", "requests_for",
    "run_cases", "timing", "write_report",
]  # fmt: skip
