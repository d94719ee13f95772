"""A measuring command: its options, and its report with bars, goals and the paper's figures."""

import argparse
from collections.abc import Sequence

from crosslmm_jax.cli.profile import add_measuring_options, outputs_of
from crosslmm_jax.profiling import Presentation, Report, Request, profile
from perf import bars, figure
from perf.command import Parser, command_line, parser_of

PRESENTATION = Presentation(fields=bars.with_bars, page=bars.page, draw=figure.draw)


def measuring_parser(name: str, doc: str | None) -> Parser:
    """A parser with the options that all measuring commands take."""
    parser = parser_of(name, doc)
    add_measuring_options(parser)
    return parser


def measure(
    task: str,
    requests: Sequence[Request],
    args: argparse.Namespace,
    *,
    presentation: Presentation = PRESENTATION,
) -> Report:
    """Measures the requests and writes the report to the files that `args` names."""
    return profile(
        task, requests, command=command_line(), outputs=outputs_of(args), presentation=presentation,
        timeout=args.timeout,
    )  # fmt: skip
