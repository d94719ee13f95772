"""`crosslmm watch`."""

import argparse

from crosslmm_jax.cli.options import Commands


def add_watch(commands: Commands) -> None:
    """Adds `watch` to the commands of `crosslmm`."""
    parser = commands.add_parser("watch", help="a run's curves in a terminal")
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run: run.out of its config")
    parser.add_argument(
        "--follow", action=argparse.BooleanOptionalAction,
        help="draw anew until the run has ended or Ctrl-C; default: on a terminal, for a run that goes on",
    )  # fmt: skip
    parser.set_defaults(run=_watch)


def _watch(args: argparse.Namespace) -> None:
    import sys

    from crosslmm_jax.train import watch

    watch(args.run_folder, follow=sys.stdout.isatty() if args.follow is None else args.follow)
