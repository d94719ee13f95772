"""Long videos: prefill over the number of frames, up to what the device holds, for each V2V scope.

The decoder reads every compact token, so its self-attention is quadratic in frames with any scope. V2V over
the whole video is quadratic too. All else is linear.
"""

from collections.abc import Sequence

from crosslmm_jax.cli.profile import add_v2v_scope, requests_of
from crosslmm_jax.profiling import Record, Request
from crosslmm_jax.profiling.tasks import prefill
from perf import figure_long_video
from perf.measure import PRESENTATION as WITH_BARS
from perf.measure import measure, measuring_parser

PRESENTATION = WITH_BARS._replace(draw=figure_long_video.draw)


def main(argv: Sequence[str]) -> None:
    """Measures each scope and number of frames."""
    parser = measuring_parser("long_video", __doc__)
    add_v2v_scope(parser)
    args = parser.parse_args(argv)
    requests = requests_of(args, Request, __name__, preallocate=True)
    measure("long_video", requests, args, presentation=PRESENTATION)


def run(record: Record) -> None:
    """Measures a prefill without a cache for each scope and number of frames of the request."""
    prefill.measure(record, forms=(False,))
