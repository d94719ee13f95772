"""Training: one stage from its first to its last step, and again from a checkpoint.

loop              when to step, report, save and stop: `train`
step              one pure training step, and the loss alone
state             everything that a step changes, and how it is sharded
stages            which parameters a stage trains, and which have adapters
optimizer         AdamW, learning-rate schedule and groups
checkpoint        saves and restores the state; decides whether a checkpoint is damaged
checksum          checksums of arrays, for that decision
validation        loss and accuracy of held-out rows
initial           whether a run may start from a MODEL folder
reporting/        metrics, on disk and on the terminal
owner             one run at a time in a folder
settings          what must agree between processes and between starts of a run
export_run        a MODEL folder from a checkpoint
interrupt         SIGTERM and Ctrl-C
watchdog          ends a run that waits in vain

Names are imported late: what only reads the files of a run works without jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crosslmm_jax.train.export_run import export
    from crosslmm_jax.train.loop import train
    from crosslmm_jax.train.reporting.watch import watch
    from crosslmm_jax.train.state import abstract_state, random_state, state_bytes_per_device
    from crosslmm_jax.train.step import compile_train_step, with_step_visibility

__all__ = [
    "abstract_state", "compile_train_step", "export", "random_state", "state_bytes_per_device", "train",
    "watch", "with_step_visibility",
]  # fmt: skip

_HOMES = {
    "abstract_state": "state", "compile_train_step": "step", "export": "export_run", "random_state": "state",
    "state_bytes_per_device": "state", "train": "loop", "watch": "reporting.watch",
    "with_step_visibility": "step",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Imports the file that defines a public name, and returns what it defines."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
