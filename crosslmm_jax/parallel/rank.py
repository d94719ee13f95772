"""Which process of a run this one is, by its environment. Joining the others is another matter."""

import os
from typing import NamedTuple

from crosslmm_jax.errors import ConfigError

_VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
_WAIT_S = 300  # on GKE, until the name of process 0's host is known


class Rank(NamedTuple):
    """A process among those of its run."""

    address: str  # host:port of process 0
    count: int  # processes of the run
    index: int  # of this one


def find_rank() -> Rank | None:
    """The rank of this process; None if it is a single one.

    A launcher sets COORDINATOR_ADDRESS (host:port of process 0), NUM_PROCESSES and PROCESS_ID. On TPUs of GKE
    none of them is set: JAX knows the hosts of all slices.

    Raises:
      ConfigError: some of the three are set but not all, the address has no port, the counts are not numbers,
        or there is no TPU where GKE says that there are several hosts with TPUs.
    """
    present = [name for name in _VARIABLES if os.environ.get(name)]
    if not present:
        return _rank_on_gke()
    missing = [name for name in _VARIABLES if name not in present]
    if missing:
        raise ConfigError(
            f"environment variable {', '.join(present)} is set but {', '.join(missing)} is not;"
            " set all three, or none for a single process"
        )
    count, index = _whole_number("NUM_PROCESSES"), _whole_number("PROCESS_ID")
    if index >= max(count, 1):
        raise ConfigError(f"environment variable PROCESS_ID is {index}; must be below NUM_PROCESSES={count}")
    address = os.environ["COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"environment variable COORDINATOR_ADDRESS is {address!r}; it must be host:port, e.g. node1:8482"
        )
    return Rank(address, count, index) if count > 1 else None


def _whole_number(name: str) -> int:
    value = os.environ[name]
    if not value.isdigit():
        raise ConfigError(f"environment variable {name} is {value!r}; it must be a whole number")
    return int(value)


def _rank_on_gke() -> Rank | None:
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," not in hosts and os.environ.get("MEGASCALE_NUM_SLICES", "1") == "1":
        return None
    from jax._src.clusters import (
        GkeTpuCluster,  # what jax.distributed.initialize() asks; it has no public name
    )

    if not GkeTpuCluster.is_env_present():
        platforms = os.environ.get("JAX_PLATFORMS", "")
        if platforms and "tpu" not in platforms:
            return None
        raise ConfigError(
            f"environment variable TPU_WORKER_HOSTNAMES names {hosts}, but JAX finds no TPU here: install"
            " '.[tpu]' in the image, or set JAX_PLATFORMS=cpu for a single process without TPU"
        )
    address = GkeTpuCluster.get_coordinator_address(_WAIT_S, os.environ.get("JAX_COORDINATOR_PORT"))
    return Rank(address, GkeTpuCluster.get_process_count(), GkeTpuCluster.get_process_id())
