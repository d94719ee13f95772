"""What keeps a run whole: one owner of its folder, an end on request, an end where it would wait in vain.

owner       one run at a time in a folder
interrupt   SIGTERM and Ctrl-C
watchdog    ends a run that waits in vain
"""

from crosslmm_jax.train.guards.interrupt import StopRequest
from crosslmm_jax.train.guards.owner import RunOwner
from crosslmm_jax.train.guards.watchdog import Watchdog

__all__ = ["RunOwner", "StopRequest", "Watchdog"]
