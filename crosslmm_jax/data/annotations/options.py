"""Reads and checks the settings of a format, which a mixture lists under `options`."""

import re
from collections.abc import Mapping, Sequence

from crosslmm_jax.data.annotations.rows import DatasetSpec, Origin
from crosslmm_jax.errors import UserError


def text_option(spec: DatasetSpec, name: str, default: str) -> str:
    """A text that is not empty, or `default`. Raises UserError naming data set and option."""
    value = spec.options.get(name)
    if name not in spec.options:
        return default
    if not isinstance(value, str) or not value:
        raise UserError(f"{spec.path}: options: {name} is {value!r}; write a text")
    return value


def path_option(spec: DatasetSpec, default: str, known: Sequence[str]) -> str:
    """The path template, option `path`. Raises UserError for an unknown name in braces, or no text."""
    value = text_option(spec, "path", default)
    if unknown := sorted(set(re.findall(r"\{(.*?)\}", value)) - set(known)):
        names = ", ".join(f"{{{name}}}" for name in known)
        raise UserError(f"{spec.path}: options: path has unknown name {{{unknown[0]}}}; known: {names}")
    return value


def choice_option(spec: DatasetSpec, name: str, known: Sequence[str]) -> str:
    """One of `known`, the first by default. Raises UserError naming data set and option."""
    value = spec.options.get(name, known[0])
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{spec.path}: options: {name} is {value!r}; write one of {', '.join(known)}")
    return value


def choices_option(
    spec: DatasetSpec, name: str, known: Sequence[str], default: Sequence[str]
) -> tuple[str, ...]:
    """A list of some of `known`. Raises UserError naming data set and option."""
    values = spec.options.get(name, default)
    if (
        isinstance(values, str)
        or not isinstance(values, Sequence)
        or not values
        or any(value not in known for value in values)
    ):
        raise UserError(f"{spec.path}: options: {name} is {values!r}; write a list of {', '.join(known)}")
    return tuple(values)


def map_option(spec: DatasetSpec, name: str, default: Mapping[str, str]) -> dict[str, str]:
    """`default`, updated with the map that the option holds. Raises UserError naming data set and option."""
    given = spec.options.get(name, {})
    if not isinstance(given, Mapping) or not all(isinstance(value, str) for value in given.values()):
        raise UserError(f"{spec.path}: options: {name} must map names to names of fields")
    if unknown := sorted(map(str, given.keys() - default.keys())):
        known = ", ".join(default)
        raise UserError(f"{spec.path}: options: {name} has unknown key {unknown[0]!r}; known: {known}")
    return {**default, **given}


def fill_path(template: str, values: Mapping[str, object], origin: Origin) -> str:
    """A path template with each "{name}" replaced. Raises DataError when a needed value is no text."""
    for name, value in values.items():
        if f"{{{name}}}" in template:
            if not isinstance(value, str) or not value:
                raise origin.error("malformed", f"{name} is {value!r}; it must be a text")
            template = template.replace(f"{{{name}}}", value)
    return template
