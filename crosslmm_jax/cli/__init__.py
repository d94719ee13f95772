"""The `crosslmm` command: parses the command line, then imports the one room that does the work."""

from crosslmm_jax.cli.app import main

__all__ = ["main"]
