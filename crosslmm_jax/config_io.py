"""Configurations as JSON-ready mappings, and config files with typed overrides.

A stored configuration holds every field. A missing value is an error, so that a MODEL folder keeps its
meaning when a default changes. tyro parses the overrides of a command line from the dataclasses' annotations.
Every failure is one `ConfigError` with file, field, value and the fix.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import runpy
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from crosslmm_jax.config import ExperimentConfig, is_remote, leaf_fields
from crosslmm_jax.errors import ConfigError, UserError

Config = TypeVar("Config")
_SCALARS: dict[object, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
}


def to_dict(config: object) -> dict[str, Any]:
    """Converts the dataclass `config` to nested dicts that `json.dump` writes; tuples become lists."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_dict needs a dataclass instance, got {config!r}")
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_dict(cls: type[Config], mapping: object, *, source: str | Path) -> Config:
    """Builds the configuration that `to_dict` converted.

    Args:
      cls: A configuration dataclass.
      mapping: Output of `json.load`.
      source: The file it came from, for messages.

    Raises:
      ConfigError: a field is unknown, missing, of another type, or has a value that `cls` rejects.
    """
    return typing.cast(Config, _read(cls, mapping, path="", source=source))


def describe(hint: object) -> str:
    """Describes in words the values of a field with the annotation `hint`."""
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return f"an object with the fields of {getattr(hint, '__name__', hint)}"
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {describe(arguments[0])}"
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in arguments)
    return "null" if hint is type(None) else _SCALARS[hint]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _read(hint: object, value: object, *, path: str, source: str | Path) -> object:
    """Converts `value` to the type `hint`; raises `ConfigError` with `source` and the field's `path`."""
    arguments = typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
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


def _read_dataclass(cls: type, value: object, *, path: str, source: str | Path) -> object:
    where = f"field {path}" if path else "the configuration"
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: {where} is {_short(value)}; it must be {describe(cls)}")
    hints = typing.get_type_hints(cls)
    prefix = f"{path}." if path else ""
    for name in value:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            fix = f"did you mean {close[0]}?" if close else f"{cls.__name__} has {', '.join(hints)}"
            shown = name if str(name).isidentifier() else _short(name)
            raise ConfigError(f"{source}: field {prefix}{shown} is unknown; {fix}")
    for name, hint in hints.items():
        if name not in value:
            raise ConfigError(f"{source}: field {prefix}{name} is missing; add it: {describe(hint)}")
    fields = {
        name: _read(hint, value[name], path=f"{prefix}{name}", source=source) for name, hint in hints.items()
    }
    try:
        return cls(**fields)
    except ConfigError as error:
        raise ConfigError(f"{source}: {where}: {error}") from error


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Runs the config file at `path` and applies `overrides` to the configuration it returns.

    Args:
      path: A Python file that defines `get_config() -> ExperimentConfig`.
      overrides: Command-line words; see `apply_overrides`.

    Raises:
      UserError: the file is missing or fails, or an override names no field or has another type.
    """
    if is_remote(path):
        raise UserError(f"{path}: object stores are not supported yet; name a file of a mounted disk")
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
            f"{path}{line}: {type(error).__name__}: {_one_line(str(error))}; fix the file"
        ) from error
    if not callable(get_config):
        raise ConfigError(f"{path}: defines no get_config(); add one that returns an ExperimentConfig")
    if not isinstance(config, ExperimentConfig):
        kind = type(config).__name__
        raise ConfigError(f"{path}: get_config() returned {kind}; it must return an ExperimentConfig")
    return config


def _line_in(path: Path, error: BaseException) -> str:
    """Returns e.g. `:12` for the line of the file `path` that raised `error`, or nothing."""
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


def option_of(name: str) -> str:
    """Command-line option of a field: `"stage.learning_rate"` -> `"--stage.learning-rate"`."""
    return f"--{name.replace('_', '-')}"


def apply_overrides(config: Config, overrides: Sequence[str], *, source: str | Path) -> Config:
    """Applies the overrides of a command line to any configuration dataclass.

    Args:
      config: The configuration to change.
      overrides: Words, e.g. `["--vision.remat", "none", "--cross-attention.directions", "v2v", "t2v"]`. Every
        field is one option; tuples take several words; `None`, `True` and `False` are written out, but an
        option without a word is `True` where that can be.
      source: Where the words apply, for messages: a config file or a command.

    Raises:
      ConfigError: a word names no field, or a value does not fit.
    """
    options = {option_of(name): leaf.type for name, leaf in leaf_fields(type(config)).items()}
    for word in overrides:
        name = word.split("=", 1)[0].replace("_", "-")
        if word.startswith("--") and name not in options:
            close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            fix = f"did you mean {close[0]}?" if close else "options are fields, e.g. --stage.learning-rate"
            raise ConfigError(f"{source}: unknown override {name}; {fix}")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box), contextlib.redirect_stdout(box):
            return _tyro(config, list(_with_true(overrides, options)))
    except SystemExit:
        raise ConfigError(f"{source}: {_condense(box.getvalue(), options)}") from None


def _with_true(words: Sequence[str], options: Mapping[str, object]) -> Iterator[str]:
    """The words, with "True" after an option that has no word and whose field is true or false."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue="--"):
        yield word
        if following.startswith("--") and options.get(word.replace("_", "-")) is bool:
            yield "True"


def print_help(config: object, *, command: str) -> None:
    """Prints every field of `config` as an option, with type, value and meaning.

    Args:
      config: Its values are shown as defaults.
      command: What the options follow, e.g. `crosslmm train configs/x.py`.
    """
    with contextlib.suppress(SystemExit):
        _tyro(config, ["--help"], command=command)


def _tyro(config: Config, words: Sequence[str], *, command: str | None = None) -> Config:
    import tyro  # late: it takes a third of a second

    # FlagConversionOff: `--data.shuffle False`, one rule for every field.
    settings = (tyro.conf.FlagConversionOff,)
    return tyro.cli(type(config), default=config, args=list(words), prog=command, config=settings)


def _condense(box: str, options: Mapping[str, object]) -> str:
    """Turns the message inside tyro's frame into one line, with the values that the option takes."""
    # Rules separate title, message and hints; they are dashes where the stream is not UTF-8.
    paragraphs = re.split(r"[─-]{4,}", re.sub(r"[╭╮╰╯│]", " ", box))
    message = _one_line(paragraphs[1] if len(paragraphs) > 1 else box).rstrip(".")
    # The check of a dataclass already says field, value and what it must be.
    checked = re.search(r"^Error parsing \w[\w.-]*: (\w+\.\w+ is .*)", message)
    if checked:
        return checked[1]
    named = re.search(r"--[\w.-]*\w", message)
    if named and named[0] in options:
        values = describe(options[named[0]]).replace("null", "None").replace("true or false", "True or False")
        return f"{message}; {named[0]} takes {values}"
    return f"{message}; write --field value, e.g. --stage.learning-rate 1e-4"
