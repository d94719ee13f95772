"""What all commands of `python -m perf` share: a parser, the command line as written, missing packages."""

import argparse
import importlib.util
import shlex
import sys
from typing import NoReturn

from crosslmm_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError`."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser_of(name: str, doc: str | None) -> Parser:
    """The parser of the command `name`, whose module has the docstring `doc`."""
    formatter = argparse.RawDescriptionHelpFormatter
    return Parser(prog=f"python -m perf {name}", description=doc, formatter_class=formatter)


def command_line() -> str:
    """The command line of this process, for a report."""
    return shlex.join(["python", "-m", "perf", *sys.argv[1:]])


def need(*packages: str) -> None:
    """Raises a `UserError` that says how to install the first of the packages that is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed: pip install -e '.[benchmark]'")
