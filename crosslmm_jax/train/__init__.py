"""Training: one stage from its first to its last step, and again from a checkpoint.

loop              when to step, report, save and stop: `train`
step              one pure training step, and the loss alone
state             everything that a step changes, and how it is sharded
stages            which parts of the model a stage trains
optimizer         AdamW, learning-rate schedule and groups
checkpoint        saves and restores the state; decides whether a checkpoint is damaged
checksum          checksums of arrays, for that decision
initial           whether a run may start from a MODEL folder
metrics_window    metrics between two reports; a loss that is not finite
metrics_log       metrics.jsonl and TensorBoard
side_channel      output that may fail or hang without stopping the run
owner             one run at a time in a folder
settings          what must agree between processes and between starts of a run
export            a MODEL folder from a checkpoint
interrupt         SIGTERM and Ctrl-C
"""

from crosslmm_jax.train.export import export
from crosslmm_jax.train.loop import train
from crosslmm_jax.train.state import abstract_state, random_state
from crosslmm_jax.train.step import compile_train_step, with_step_visibility

__all__ = [
    "abstract_state", "compile_train_step", "export", "random_state", "train", "with_step_visibility",
]  # fmt: skip
