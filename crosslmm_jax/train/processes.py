"""Whether the processes of a run have the same settings."""

from collections.abc import Mapping, Sequence

from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model_folder import flatten

# Where a host finds its copies and how fast it reads them; the index itself is compared by its digest. These
# are not the fields of role `Host`: `run.out` and the like must agree: all processes save and log at the same
# steps. Checkpoints hold the settings of process 0, and a resume compares them with those of process 0.
_OF_A_HOST = frozenset({
    "data.index", "data.tokenizer", "data.num_workers", "data.num_threads", "data.prefetch",
    "data.frame_cache_mb", "run.init_from",
})  # fmt: skip


def check_same_settings(settings: Sequence[Mapping[str, object]]) -> None:
    """Checks that all processes have the same settings, except for those that may differ between hosts.

    Args:
      settings: of each process, nested dicts of JSON values.

    Raises:
      ConfigError: settings that decide what the run computes differ; the message lists the first eight.
    """
    first, *others = (flatten(each) for each in settings)
    different = []
    for index, other in enumerate(others, start=1):
        names = sorted((first.keys() | other.keys()) - _OF_A_HOST)
        different += [
            f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process {index}"
            for name in names
            if first.get(name) != other.get(name)
        ]
    if different:
        raise ConfigError(
            f"the processes of this run differ: {'; '.join(different[:8])}; give all of them the same config,"
            " and at data.index copies of one index"
        )
