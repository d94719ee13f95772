"""The options of `python -m perf ask`, and the list of what is measured."""

import argparse
import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import perf.ask
from crosslmm_jax.cli.profile import add_output_options, outputs_of
from crosslmm_jax.parallel import compilation_cache
from crosslmm_jax.profiling import AskRequest, Presentation, Request, ask, profile
from perf import bars
from perf.ask.folder import FolderRequest
from perf.ask.inputs import InputRequest
from perf.ask.many import ManyRequest
from perf.ask.peer import PHASES, PeerRequest
from perf.command import command_line, parser_of

MEASURES = ("ask", "many", "inputs", "peer")
SIZES = {"crosslmm_2b": "llava-onevision-0.5b", "crosslmm_7b": "llava-onevision-7b"}
TINY = {"tiny": "llava-onevision-tiny"}
FRAMES, FRAMES_OF_MANY = 256, 64
TINY_FRAMES = 8
PRESENTATION = Presentation(
    fields=lambda report: bars.with_bars({**report, "units": ask.UNITS}),  # type: ignore[typeddict-item]
    page=lambda report: bars.page(report, show=functools.partial(ask.page, phases=PHASES)),
    draw=lambda report, path: ask.draw(report, path, PHASES),
)


def main(argv: Sequence[str]) -> None:
    """Measures what the options name, and writes the report after each process."""
    parser = parser_of("ask", perf.ask.__doc__)
    parser.add_argument("--preset", nargs="+", choices=SIZES, default=list(SIZES), help="default: both")
    parser.add_argument(
        "--measures", nargs="+", choices=MEASURES, default=list(MEASURES),
        help="many and inputs are measured with the first preset, peer beside crosslmm_7b; default: all",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="all of it at the tiny size, on any machine")
    parser.add_argument("--tokenizer", metavar="DIR", help="of Qwen2.5; default: a small one, made here")
    parser.add_argument("--video", metavar="PATH", help="default: 20 s of h264 are made")
    parser.add_argument("--other-video", metavar="PATH", help="of another length; default: 13 s are made")
    parser.add_argument(
        "--videos", metavar="DIR", help="of .mp4 files for many and inputs; default: ten are made"
    )
    parser.add_argument(
        "--work", metavar="DIR", help="where files are made and kept; default: a temporary folder"
    )
    parser.add_argument("--frames", type=int, metavar="N", help=f"of one video; default: {FRAMES}")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measured runs; default: 3")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: CPU cores"
    )
    add_output_options(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        work = Path(args.work or name)
        with _programs_below(work / "cache"):
            profile(
                "ask", requests_of(args, work), command=command_line(), outputs=outputs_of(args),
                presentation=PRESENTATION, timeout=args.timeout,
            )  # fmt: skip


@contextlib.contextmanager
def _programs_below(folder: Path) -> Iterator[None]:
    """Processes keep compiled programs below `folder`: the first one finds none of earlier runs."""
    before = dict(os.environ)
    os.environ.setdefault("XDG_CACHE_HOME", str(folder.absolute()))
    compilation_cache.apply(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def requests_of(args: argparse.Namespace, work: Path) -> list[Request]:
    """One per process, in the order in which they run."""
    sizes = TINY if args.tiny else {name: SIZES[name] for name in args.preset}
    frames = (args.frames or (TINY_FRAMES if args.tiny else FRAMES),)
    of_many = (min(*frames, FRAMES_OF_MANY),)
    video = args.video or str(work / "clip.mp4")
    other = args.other_video or str(work / "other.mp4")
    videos = args.videos or str(work / "videos")
    found: list[Request] = []
    for number, (size, peer) in enumerate(sizes.items()):
        folder = str(work / size)
        # A folder of its own for each size, made when its turn comes: both need the whole device.
        found.append(FolderRequest(
            task="perf.ask.folder", system=size, frames=frames, folder=folder, tokenizer=args.tokenizer,
            work=str(work),
        ))  # fmt: skip
        if "ask" in args.measures:
            found.append(AskRequest(
                task="crosslmm_jax.profiling.tasks.ask", system=size, frames=frames, repeats=args.repeats,
                model=folder, video=video, other_video=other, max_new_tokens=args.max_new_tokens,
            ))  # fmt: skip
        if "many" in args.measures and number == 0:
            found.append(ManyRequest(
                task="perf.ask.many", system=size, frames=of_many, model=folder, videos=videos,
                users_allocator=True,
            ))  # fmt: skip
        if "inputs" in args.measures and number == 0:
            found += [
                InputRequest(
                    task="perf.ask.inputs", system=size, frames=of_many, what=what, model=folder,
                    videos=videos, work=str(work), workers=args.workers, repeats=args.repeats,
                    users_allocator=True,
                )
                for what in ("index", "first batch")
            ]  # fmt: skip
        if "peer" in args.measures and size != "crosslmm_2b":
            found.append(PeerRequest(
                task="perf.ask.peer", system=peer, frames=frames, repeats=args.repeats, model=folder,
                video=video, max_new_tokens=args.max_new_tokens,
            ))  # fmt: skip
    return found
