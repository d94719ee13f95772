"""Options that several commands share.

A command that takes fields of a configuration has one option per field, spelled as in `crosslmm train`:

    add_field_options(parser, ModelConfig)                                   # builds the parser
    config = config_io.apply_overrides(config, args.overrides, source=...)   # runs the command
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import IO, Literal, NoReturn, TypeAlias, get_args, get_origin

from crosslmm_jax.config import LARGEST_SEED, leaf_fields
from crosslmm_jax.config_io import option_of
from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import check_local


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage block before an error."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` with `message` and the command that explains the options."""
        raise UserError(f"{message}; see `{self.prog} --help`")

    def _print_message(self, message: str, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """Prints help and version. argparse would say nothing where that fails, as on a full disk."""
        (file or sys.stdout).write(message)


Commands: TypeAlias = "argparse._SubParsersAction[OneLineParser]"


class _Override(argparse.Action):
    """Appends the option and its values to `args.overrides`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        words = values if isinstance(values, list) else [values]
        namespace.overrides = [*namespace.overrides, self.option_strings[0], *words]


def add_field_options(
    parser: argparse.ArgumentParser, config_class: type, names: Iterable[str] | None = None
) -> None:
    """Adds typed overrides, e.g. `--vision.remat none`; `args.overrides` holds those that are given.

    Args:
      parser: Of the command.
      config_class: A configuration dataclass.
      names: Dotted names of the fields that the command reads; None: every field.
    """
    leaves = leaf_fields(config_class)
    parser.usage = f"{parser.prog} [options] [--field value ...]"
    group = parser.add_argument_group(
        f"fields of {config_class.__name__}", "The meaning of each: `crosslmm train CONFIG.py --help`."
    )
    for name in leaves if names is None else names:
        hint = leaves[name].type
        several = get_origin(hint) is tuple
        group.add_argument(
            option_of(name), dest="overrides", default=[], action=_Override, nargs="*" if several else None,
            metavar=_metavar(get_args(hint)[0] if several else hint),
        )  # fmt: skip


def _metavar(hint: object) -> str:
    """Values of a field with annotation `hint`, as `crosslmm train CONFIG.py --help` shows them."""
    if get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint))}}}"
    if get_origin(hint) is UnionType:
        return "|".join(_metavar(choice) for choice in reversed(get_args(hint)))
    names = {bool: "{True,False}", int: "INT", float: "FLOAT", str: "STR"}
    return names[hint] if isinstance(hint, type) and hint in names else "{None}"


class Renamed(argparse.Action):
    """An option with a new spelling. Its use ends with one line that says it.

    `add_argument("--frames", action=Renamed, const="--sampling.frames")` for an option that is now called
    `--sampling.frames`; without `const` for one that took words FIELD=VALUE and is now one option per field.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, const: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs="*", const=const, help=argparse.SUPPRESS)

    def __call__(  # noqa: D102 (argparse's)
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        words = [str(value) for value in values] if isinstance(values, list) else []
        given = " ".join([str(option_string), *words])
        if self.const is not None:
            new = [self.const, *words]
        elif words and all(name and value for name, _, value in (word.partition("=") for word in words)):
            new = [new_word for word in words for new_word in _option_words(word)]
        else:
            raise UserError(f"{given}: write --FIELD VALUE, such as --vision.remat none")
        raise UserError(f"{given} is now written {' '.join(new)}")


def _option_words(assignment: str) -> list[str]:
    """The option and the values of FIELD=VALUE, whose value is JSON or a plain text."""
    name, _, text = assignment.partition("=")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return [option_of(name), *(str(item) for item in (value if isinstance(value, list) else [value]))]


def next_commands(model: str | Path) -> str:
    """What can be done with a MODEL folder, or the folder of a run that has one."""
    folder = shlex.quote(str(model))
    ask = f'crosslmm ask {folder} VIDEO "QUESTION"'
    return f"next: {ask}, or train a further stage with --run.init-from {folder}"


def seed(text: str) -> int:
    """Parses an argument that is a seed."""
    if not text.isdecimal() or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number within 0..{LARGEST_SEED}")
    return int(text)


def say(ending: str) -> None:
    """Prints the last line of a command. Its work is done: it succeeds even where nobody can hear it."""
    try:
        print(ending, flush=True)
    except OSError:
        drop_output()


def drop_output() -> None:
    """Sends stdout nowhere from now on, since Python fails at its exit over what is left in the buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_output(option: str, path: str | None) -> None:
    """Raises a UserError for an output that cannot be written, before long work begins."""
    if path in (None, "-"):
        return
    check_local(path)
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: the folder {folder} does not exist; create it or name another")
    if Path(path).is_dir():
        raise UserError(f"{option} {path}: this is a folder; name a file")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`, for `write_json`."""
    parser.add_argument("--json", metavar="-|PATH", help="write JSON to a file, or - for only JSON on stdout")


def write_json(target: str, payload: object) -> None:
    """Prints `payload` when `target` is "-", else writes it to that file."""
    text = json.dumps(payload, indent=2, ensure_ascii=False)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--json {target}: {reason}; give a file in a folder that can be written") from error
