"""What a run says of itself while it trains.

run_report        says it: on the terminal, in metrics.jsonl and log.jsonl, for TensorBoard
metrics_window    metrics between two reports, and where their time went; a loss that is not finite
hosts             what each process adds to a report
metrics_line      a line of metrics.jsonl, and the same in a few words
work              tokens, frames and FLOPs of a batch
metrics_log       metrics.jsonl and TensorBoard
run_log           log.jsonl
json_lines        files of one JSON object per line
traces            a profiler's trace of some steps
wandb_log         metrics for Weights & Biases
wandb_process     the program that hands them over
watch             the curves of a run in a terminal
side_channel      output that may fail or hang without stopping the run
"""

from crosslmm_jax.train.reporting.metrics_log import MetricsLine, read_metrics
from crosslmm_jax.train.reporting.run_log import read_log
from crosslmm_jax.train.reporting.side_channel import SideChannel

__all__ = ["MetricsLine", "SideChannel", "read_log", "read_metrics"]
