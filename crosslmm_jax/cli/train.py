"""`crosslmm train`."""

import argparse
import shlex

from crosslmm_jax.cli.options import Commands, next_commands, say


def add_train(commands: Commands) -> None:
    """Adds `train` to the commands of `crosslmm`."""
    train = commands.add_parser(
        "train", help="train one stage; the same command resumes",
        usage="crosslmm train CONFIG.py [--field value ...]",
        epilog="Every field of the configuration is an option after the file, e.g. --stage.learning-rate 1e-4"
        " --data.shuffle False --data.text-buckets 64 128. `crosslmm train CONFIG.py --help` lists them with"
        " type, value in that file, and meaning.",
    )  # fmt: skip
    train.add_argument("config", metavar="CONFIG.py", help="a file of configs/, or of yours")
    train.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--field value")
    train.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from crosslmm_jax.config_io import load_experiment, print_help

    if {"-h", "--help"} & set(args.overrides):
        print_help(load_experiment(args.config), command=shlex.join(["crosslmm", "train", args.config]))
        return
    config = load_experiment(args.config, args.overrides)
    from crosslmm_jax.parallel import is_first_process
    from crosslmm_jax.train import train

    result = train(config)
    if is_first_process():
        steps = config.stage.steps
        done = f"trained for {steps} steps"
        if result.resumed_step == steps:
            done = f"which an earlier command has {done}; nothing was left to do"
        say(f"{result.model_folder}: a MODEL folder, {done}; {next_commands(config.run.out)}")
