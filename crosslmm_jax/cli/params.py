"""`crosslmm params`."""

import argparse

from crosslmm_jax.cli.options import Commands, add_json_option, write_json


def add_params(commands: Commands) -> None:
    """Adds `params` to the commands of `crosslmm`."""
    params = commands.add_parser("params", help="parameters by part and by stage, without allocating them")
    params.add_argument("--preset", required=True, metavar="NAME", help="e.g. crosslmm_2b")
    add_json_option(params)
    params.set_defaults(run=_params)


def _params(args: argparse.Namespace) -> None:
    from crosslmm_jax.presets import get_preset
    from crosslmm_jax.profiling import params

    config = get_preset(args.preset)
    if args.json != "-":
        print(params.table(args.preset, config))
    if args.json is not None:
        write_json(args.json, params.count(config))
