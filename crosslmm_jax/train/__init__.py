"""Training: one stage from its first to its last step, and again from a checkpoint.

loop              when to step, report, save and stop: `train`
step              one pure training step, and the loss alone
state             everything that a step changes, and how it is sharded
stages            which parameters a stage trains, and which have adapters
memory            bytes that a step needs of a device, and how many rows fit at once
optimizer         AdamW, learning-rate schedule and groups
checkpoint        saves and restores the state; decides whether a checkpoint is damaged
checksum          checksums of arrays, for that decision
validation        loss and accuracy of held-out rows
initial           whether a run may start from a MODEL folder
reporting/        metrics, on disk and on the terminal
settings          what must agree between processes and between starts of a run
export_run        a MODEL folder from a checkpoint
guards/           one owner of a run folder, SIGTERM and Ctrl-C, the watchdog

Names are imported late: what only reads the files of a run works without jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosslmm_jax.train.export_run import export
    from crosslmm_jax.train.loop import train
    from crosslmm_jax.train.memory import Shape, StepBytes, fewest_microbatches, step_bytes
    from crosslmm_jax.train.reporting.watch import watch
    from crosslmm_jax.train.stages import adapter_sizes, model_of_stage, trained_shares
    from crosslmm_jax.train.state import abstract_state, random_state, state_bytes_per_device
    from crosslmm_jax.train.step import compile_train_step, with_step_visibility

__all__ = [
    "Shape", "StepBytes", "abstract_state", "adapter_sizes", "compile_train_step", "export",
    "fewest_microbatches", "model_of_stage", "random_state", "state_bytes_per_device", "step_bytes", "train",
    "trained_shares", "watch", "with_step_visibility",
]  # fmt: skip

_HOMES = {
    "Shape": "memory", "StepBytes": "memory", "abstract_state": "state", "adapter_sizes": "stages",
    "compile_train_step": "step", "export": "export_run",
    "fewest_microbatches": "memory", "model_of_stage": "stages",
    "random_state": "state", "state_bytes_per_device": "state", "step_bytes": "memory", "train": "loop",
    "trained_shares": "stages", "watch": "reporting.watch",
    "with_step_visibility": "step",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Imports the file that defines a public name, and returns what it defines."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
