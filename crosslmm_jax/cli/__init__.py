"""The `crosslmm` command: parses the command line, then imports the one room that does the work.

| file | holds |
|---|---|
| `app.py` | the parser of all commands, exit codes |
| `options.py` | options that several commands share: fields of a configuration, `--json` |
| `ask.py`, `train.py`, `convert.py`, ... | one group of commands each |
"""

from crosslmm_jax.cli.app import main

__all__ = ["main"]
