"""Which settings must agree: those of a run's processes, and those of its starts.

The settings of a run are its config and, under names that end in "_digest", what its paths lead to. Files may
move between two starts, and their places may differ between hosts, as long as their content is the same.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence

from crosslmm_jax.config import ExperimentConfig, names_with_role
from crosslmm_jax.config_io import from_dict, option_of, to_dict
from crosslmm_jax.data.index import open_index
from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.model_folder import content_digest, find_model_folder, flatten, unflatten

Settings = Mapping[str, object]  # nested dicts of JSON values

# Path -> name of the digest of what is there.
_DIGESTS = {
    "data.index": "index_digest", "data.validation.index": "validation_digest",
    "data.tokenizer": "tokenizer_digest", "run.init_from": "init_from_digest",
}  # fmt: skip
# Where a host finds its copies and how fast it reads them. These are not the fields of role `Host`: `run.out`
# and the like must agree: all processes save and log at the same steps. Checkpoints hold the settings of
# process 0, and a resume compares them with those of process 0.
_OF_A_HOST = frozenset({
    *_DIGESTS, "data.num_workers", "data.num_threads", "data.prefetch", "data.frame_cache_mb",
})  # fmt: skip
# Fields that may differ from the checkpoint's: they change where or how fast a run computes, not what.
_FREE = frozenset(names_with_role(ExperimentConfig, "performance", "host")) | {"data.index"}
# Fields that cannot change within a run, and why.
_FIXED = dict.fromkeys(
    names_with_role(ExperimentConfig, "architecture", "identity"), "decide what weights and data mean"
) | {
    "stage.trainable": "decide what the optimiser's state holds",
    "stage.frozen": "decide what the optimiser's state holds",
    "stage.lora.rank": "decide what the optimiser's state holds",
    "stage.lora.targets": "decide what the optimiser's state holds",
    "stage.frozen_dtype": "decide what the checkpoints hold",
    "run.init_from": "decide the weights before the first step",
    "run.seed": "decide the weights before the first step",
}
_ABSENT = "(no such field)"


def _defaults(config_class: type) -> dict[str, object]:
    """Default of every field that has one, as JSON holds it, by dotted name."""
    found: dict[str, object] = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hint := hints[field.name]):
            inner = _defaults(typing.cast(type, hint))
            found |= {f"{field.name}.{name}": value for name, value in inner.items()}
        elif field.default is not dataclasses.MISSING:
            found[field.name] = list(field.default) if isinstance(field.default, tuple) else field.default
    return found


# A field that is younger than a checkpoint had no other meaning than its default.
_DEFAULTS = _defaults(ExperimentConfig)


def settings_of(config: ExperimentConfig) -> dict[str, object]:
    """The settings of a run. Raises a UserError when there is no index."""
    index, held_out = open_index(config.data.index), config.data.validation.index
    weights = None
    if config.run.init_from is not None:
        try:
            weights = content_digest(find_model_folder(config.run.init_from))
        except UserError:
            pass  # a run that resumes does not need it any more; one that starts says what is wrong
    return to_dict(config) | {
        "index_digest": index.digest,
        "validation_digest": None if held_out is None else open_index(held_out).digest,
        "tokenizer_digest": index.tokenizer, "init_from_digest": weights,
    }  # fmt: skip


def config_of(saved: Settings, *, source: str) -> ExperimentConfig:
    """The config in the settings of a checkpoint, which may be older than some of its fields.

    Raises:
      ConfigError: a field cannot be read. Names `source`, the checkpoint.
    """
    config = {name: value for name, value in saved.items() if name not in _DIGESTS.values()}
    return from_dict(ExperimentConfig, unflatten({**_DEFAULTS, **flatten(config)}), source=source)


def check_same_settings(settings: Sequence[Settings]) -> None:
    """Checks that all processes have the same settings, except for those that may differ between hosts.

    Args:
      settings: of each process.

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
            if first.get(name) != other.get(name) and not _is_unknown(name, first, other)
        ]
    if different:
        raise ConfigError(
            f"the processes of this run differ: {'; '.join(different[:8])}; give all of them the same config,"
            f" and at {', '.join(_DIGESTS)} copies of the same files"
        )


def _is_unknown(name: str, *settings: Settings) -> bool:
    """Whether `name` is the digest of a path that leads nowhere on some host, or of an earlier version."""
    return name in _DIGESTS.values() and any(each.get(name) is None for each in settings)


def with_known_digests(now: Settings, saved: Settings) -> dict[str, object]:
    """`now`, with the digests of the checkpoint for paths that lead nowhere any more."""
    return {**now, **{name: saved.get(name) for name in _DIGESTS.values() if now.get(name) is None}}


def check_resumable(now: Settings, saved: Settings, *, where: str, accept_changes: bool) -> list[str]:
    """Compares the settings of a run with those in its checkpoint, field by field.

    Args:
      now: of this start.
      saved: of the start that wrote the checkpoint.
      where: the checkpoint's path, for the message.
      accept_changes: whether fields of role "recipe" may differ.

    Returns:
      What has changed on purpose: "stage.learning_rate was 0.1 and is 0.2".

    Raises:
      ConfigError: a field differs that cannot change, or that may change only on purpose.
    """
    changes = _changes(flatten(now), flatten(saved))
    for reason in dict.fromkeys(_FIXED.values()):
        if fixed := [text for name, text in changes.items() if _FIXED.get(name) == reason]:
            raise ConfigError(
                f"{where}: this checkpoint was written with another config: {'; '.join(fixed)}; these"
                f" {reason} and cannot change within a run: set them back, or choose another run.out"
            )
    if changes and not accept_changes:
        raise ConfigError(
            f"{where}: this checkpoint was written with another config: {'; '.join(changes.values())}; set"
            f" these fields back, or add {option_of('run.accept_changes')} to go on with the new values"
        )
    return list(changes.values())


def _changes(now: Settings, saved: Settings) -> dict[str, str]:
    """Field -> "it was 1 and is 2", for each that differs and that decides what a run computes."""
    by_content = {path: name for path, name in _DIGESTS.items() if not _is_unknown(name, now, saved)}
    names = sorted((now.keys() | saved.keys()) - _FREE - set(_DIGESTS.values()))
    found = {}
    for name in [*names, *(path for path in by_content if path in _FREE)]:
        before, after = saved.get(name, _DEFAULTS.get(name, _ABSENT)), now.get(name, _ABSENT)
        if name not in by_content:
            if before != after:
                found[name] = f"{name} was {before!r} and is {after!r}"
        elif saved[by_content[name]] != now[by_content[name]]:
            old, new = saved[by_content[name]], now[by_content[name]]
            found[name] = f"{name} was {before!r} (content {old}) and is {after!r} (content {new})"
    return found
