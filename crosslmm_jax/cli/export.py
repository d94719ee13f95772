"""`crosslmm export`."""

import argparse

from crosslmm_jax.cli.options import Commands, next_commands, say


def add_export(commands: Commands) -> None:
    """Adds `export` to the commands of `crosslmm`."""
    parser = commands.add_parser("export", help="a MODEL folder from any checkpoint of a run")
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run: run.out of its config")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="of the checkpoint; default: the newest")
    which.add_argument("--best", action="store_true", help="that with the smallest validation loss")
    parser.add_argument("--out", metavar="MODEL", help="folder to write; default: RUN/model_STEP")
    parser.add_argument("--tokenizer", metavar="DIR", help="default: as the run's config says")
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from crosslmm_jax.train import export

    written = export(args.run_folder, step=args.step, best=args.best, out=args.out, tokenizer=args.tokenizer)
    say(
        f"{written.folder}: a MODEL folder with the weights of step {written.step};"
        f" {next_commands(written.folder)}"
    )
