"""`crosslmm plan`."""

import argparse

from crosslmm_jax.cli.options import Commands, OneLineParser, add_json_option, write_json


def _options() -> OneLineParser:
    """The options of `plan` that are no fields of the configuration."""
    options = OneLineParser(prog="crosslmm plan", add_help=False, allow_abbrev=False)
    options.add_argument("--devices", type=int, metavar="N", help="number of devices")
    options.add_argument(
        "--device", default="h200", metavar="KIND", help="a100, h100, h200, b200, v4, v5e, v5p or v6e (h200)"
    )
    options.add_argument(
        "--frames", type=int, metavar="N", help="of every row (the most that the config allows)"
    )
    options.add_argument("--text", type=int, metavar="N", help="text tokens of every row (the same)")
    add_json_option(options)
    return options


def add_plan(commands: Commands) -> None:
    """Adds `plan` to the commands of `crosslmm`."""
    plan = commands.add_parser(
        "plan", help="memory, traffic and time of a training step, without its devices",
        usage="crosslmm plan CONFIG.py --devices N [--device KIND] [--field value ...]",
        epilog="Fields of the configuration are options too, as of `crosslmm train`.", parents=[_options()],
    )  # fmt: skip
    plan.add_argument("config", metavar="CONFIG.py", help="a file of configs/, or of yours")
    plan.add_argument("words", nargs=argparse.REMAINDER, metavar="--field value")
    plan.set_defaults(run=_plan, print_help=plan.print_help)


def _plan(args: argparse.Namespace) -> None:
    if {"-h", "--help"} & set(args.words):
        args.print_help()
        return
    args, overrides = _options().parse_known_args(args.words, args)
    if args.devices is None:
        _options().error("--devices N is required")
    from crosslmm_jax.config_io import load_experiment
    from crosslmm_jax.profiling import plan

    made = plan.make_plan(
        load_experiment(args.config, overrides),
        devices=args.devices, device=args.device, frames=args.frames, text=args.text,
    )  # fmt: skip
    if args.json != "-":
        print("\n".join(plan.lines(made)))
    if args.json is not None:
        write_json(args.json, plan.as_json(made))
