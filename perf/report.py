"""A report of `crosslmm profile` or `python -m perf` with the project's bars, goals and the paper's numbers.

Reads the JSON file of a report and prints its page; nothing is measured.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import PyTree

from crosslmm_jax.errors import UserError
from crosslmm_jax.profiling import Outputs, Report, write_report
from perf import bars, long_video
from perf.command import parser_of
from perf.measure import PRESENTATION


def main(argv: Sequence[str]) -> None:
    """Writes the files that the options name, and prints the page."""
    parser = parser_of("report", __doc__)
    parser.add_argument("report", metavar="REPORT.json")
    parser.add_argument("--json", metavar="PATH", help="with the bars; may be REPORT.json itself")
    parser.add_argument("--markdown", metavar="PATH")
    parser.add_argument("--figure", metavar="PATH", help=".png, .svg or .pdf")
    args = parser.parse_args(argv)
    report = read(args.report)
    presentation = long_video.PRESENTATION if report["task"] == "long_video" else PRESENTATION
    write_report(report, Outputs(json=args.json, markdown=args.markdown, figure=args.figure), presentation)
    print(bars.page(report))


def read(path: str) -> Report:
    """The report in the file `path`.

    Raises:
      UserError: no such file, or no report.
    """
    try:
        found: PyTree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; give the --json file of a report") from error
    missing = [name for name in Report.__required_keys__ if name not in found]
    if missing:
        raise UserError(f"{path}: has no {min(missing)}; give the --json file of a report")
    return found
