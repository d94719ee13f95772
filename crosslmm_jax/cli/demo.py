"""`crosslmm demo`."""

import argparse

from crosslmm_jax.cli.options import Commands


def add_demo(commands: Commands) -> None:
    """Adds `demo` to the commands of `crosslmm`."""
    demo = commands.add_parser("demo", help="the whole path on a CPU: make videos, train, evaluate, ask")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="default: runs/demo")
    demo.add_argument("--seed", type=int, default=0, help="of videos, weights and order of rows; default: 0")
    demo.add_argument("--quick", action="store_true", help="few steps: shows that it runs, learns little")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from crosslmm_jax.demo import run

    run(args.out, seed=args.seed, quick=args.quick)
