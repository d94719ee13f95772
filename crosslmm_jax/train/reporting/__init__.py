"""What a run says of itself while it trains: metrics, on disk and on the terminal.

metrics_window    metrics between two reports; a loss that is not finite
metrics_log       metrics.jsonl and TensorBoard
side_channel      output that may fail or hang without stopping the run
"""

from crosslmm_jax.train.reporting.metrics_log import MetricsLine, MetricsLog, read_metrics
from crosslmm_jax.train.reporting.side_channel import SideChannel

__all__ = ["MetricsLine", "MetricsLog", "SideChannel", "read_metrics"]
