"""Configurations as JSON-ready mappings, and config files with typed overrides.

A stored configuration names every field: a missing value is an error, never a guess, so that a MODEL
folder means the same when a default changes. Overrides on the command line are parsed by tyro from the
dataclasses' annotations. Every failure is one `ConfigError` that names file, field, value and the fix.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from crosslmm_jax.config import ExperimentConfig
from crosslmm_jax.errors import ConfigError, UserError

Config = TypeVar("Config")
_SCALAR_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def to_dict(config: object) -> dict[str, Any]:
    """Nested dict of `config`, a dataclass, that `json.dump` writes; tuples become lists."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_dict needs a dataclass instance, got {config!r}")
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_dict(cls: type[Config], mapping: object, *, source: str | Path) -> Config:
    """The configuration that `to_dict` wrote.

    Args:
      cls: A configuration dataclass.
      mapping: What `json.load` read.
      source: The file it came from, for messages.

    Raises:
      ConfigError: a field is unknown, missing, of another type, or has a value that `cls` rejects.
    """
    return _read(cls, mapping, path="", source=source)


def describe(hint: Any) -> str:
    """What a field annotated with `hint` takes, in words."""
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return f"an object with the fields of {getattr(hint, '__name__', hint)}"
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {describe(arguments[0])}"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    return "null" if hint is type(None) else _SCALAR_NAMES[hint]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _read(hint: Any, value: object, *, path: str, source: str | Path) -> Any:
    """`value` as the type `hint`, or a `ConfigError` that names `source` and the field at `path`."""
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, value, path=path, source=source)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        items = enumerate(value)
        return tuple(_read(arguments[0], item, path=f"{path}[{i}]", source=source) for i, item in items)
    if typing.get_origin(hint) in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (present,) = (choice for choice in arguments if choice is not type(None))
        with contextlib.suppress(ConfigError):
            return _read(present, value, path=path, source=source)
    elif typing.get_origin(hint) is Literal:
        # Equality alone would let 1 pass for True.
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif hint is float and type(value) in (int, float):
        return _as_float(typing.cast(float, value), path=path, source=source)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{source}: field {path} is {_short(value)}; it must be {describe(hint)}")


def _as_float(value: float, *, path: str, source: str | Path) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{source}: field {path} is an integer too large for a number") from None


def _read_dataclass(cls: Any, value: object, *, path: str, source: str | Path) -> Any:
    where = f"field {path}" if path else "the configuration"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: {where} is {_short(value)}; it must be {describe(cls)}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    prefix = f"{path}." if path else ""
    for name in value:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            fix = f"did you mean {close[0]}?" if close else f"{cls.__name__} has {', '.join(names)}"
            shown = name if str(name).isidentifier() else _short(name)
            raise ConfigError(f"{source}: field {prefix}{shown} is unknown; {fix}")
    for name in names:
        if name not in value:
            raise ConfigError(f"{source}: field {prefix}{name} is missing; add it: {describe(hints[name])}")
    fields = {name: _read(hints[name], value[name], path=f"{prefix}{name}", source=source) for name in names}
    try:
        return cls(**fields)
    except ConfigError as error:
        raise ConfigError(f"{source}: {where}: {error}") from error


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The `ExperimentConfig` that the config file at `path` returns, with `overrides` applied.

    Args:
      path: A Python file that defines `get_config() -> ExperimentConfig`.
      overrides: Command-line words, e.g. `["--stage.learning-rate", "1e-4"]`. Every field is one option;
        tuples take several words, `None` and `True`/`False` are written out.

    Raises:
      UserError: the file is missing or fails, or an override names no field or has another type.
    """
    config = _run_config_file(Path(path))
    return apply_overrides(config, overrides, source=path) if overrides else config


def _run_config_file(path: Path) -> ExperimentConfig:
    if not path.is_file():
        raise UserError(f"{path}: no such config file; give a Python file, e.g. configs/tiny_stage1.py")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else None
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:
        line = _line_in(path, error)
        raise ConfigError(
            f"{path}{line}: {type(error).__name__}: {_one_line(str(error))}; mend the file"
        ) from error
    if not callable(get_config):
        raise ConfigError(f"{path}: defines no get_config(); add one that returns an ExperimentConfig")
    if not isinstance(config, ExperimentConfig):
        kind = type(config).__name__
        raise ConfigError(f"{path}: get_config() returned {kind}; it must return an ExperimentConfig")
    return config


def _line_in(path: Path, error: BaseException) -> str:
    """`:12` when the innermost call inside the file `path` that led to `error` is on its line 12."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}" if error.lineno else ""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _one_line(text: str) -> str:
    return " ".join(text.split())


def option_types(cls: type) -> dict[str, Any]:
    """Option -> type of every leaf field of `cls`, e.g. `{"--stage.learning-rate": float}`."""
    options: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        option = f"--{name.replace('_', '-')}"
        if dataclasses.is_dataclass(hint):
            nested = option_types(typing.cast(type, hint))
            options.update({f"{option}.{inner[2:]}": kind for inner, kind in nested.items()})
        else:
            options[option] = hint
    return options


def apply_overrides(config: Config, overrides: Sequence[str], *, source: str | Path) -> Config:
    """`config` with the command-line `overrides`; raises `ConfigError` on the first that does not fit."""
    import tyro  # here, since it takes a third of a second

    options = option_types(type(config))
    for word in overrides:
        name = word.split("=", 1)[0].replace("_", "-")
        if word.startswith("--") and name not in options:
            close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            fix = f"did you mean {close[0]}?" if close else "options are fields, e.g. --stage.learning-rate"
            raise ConfigError(f"{source}: unknown override {name}; {fix}")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(box):
            # FlagConversionOff: `--data.shuffle False`, one rule for every field.
            return tyro.cli(
                type(config), default=config, args=list(overrides), config=(tyro.conf.FlagConversionOff,)
            )
    except SystemExit:
        raise ConfigError(f"{source}: {_condense(box.getvalue(), options)}") from None


def _condense(box: str, options: Mapping[str, Any]) -> str:
    """The message inside tyro's frame as one line, with what the option takes."""
    # Title, message and hints are divided by rules: of dashes where the stream is not UTF-8.
    paragraphs = re.split(r"[─-]{4,}", re.sub(r"[╭╮╰╯│]", " ", box))
    message = _one_line(paragraphs[1] if len(paragraphs) > 1 else box).rstrip(".")
    # A dataclass's own check already names field, value and what would be right.
    checked = re.search(r"^Error parsing \w[\w.-]*: (\w+\.\w+ is .*)", message)
    if checked:
        return checked[1]
    named = re.search(r"--[\w.-]*\w", message)
    if named and named[0] in options:
        return f"{message}; {named[0]} takes {describe(options[named[0]])}"
    return f"{message}; write --field value, e.g. --stage.learning-rate 1e-4"
