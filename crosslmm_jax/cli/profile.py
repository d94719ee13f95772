"""The options of `crosslmm profile`. Nothing heavy is imported here, so that `--help` answers at once."""

import argparse
import functools
import shlex
import sys
from typing import TYPE_CHECKING, NoReturn, get_args

from crosslmm_jax.cli.options import Commands, Renamed, add_field_options
from crosslmm_jax.config import ModelConfig, Precision
from crosslmm_jax.errors import UserError

if TYPE_CHECKING:
    from crosslmm_jax.profiling import Outputs, Request

# Task that runs presets -> what it measures.
TASKS = {
    "prefill": "pixels on the device and a prompt's tokens, to the first logits",
    "decode": "tokens generated in one loop, and the time to read weights and caches once",
    "train": "one step of stage 2",
    "encoder": "the vision encoder alone",
}
SCOPES = ("video", "frame", "window")
REMATS = ("none", "elementwise", "layer", "chunk")
# Option -> the tasks that take it.
TASKS_OF_OPTIONS = {
    "precision": ("encoder", "prefill", "decode"), "v2v_scope": ("prefill",), "remat": ("train",),
}  # fmt: skip
# What the project measures about itself: task or option -> its command in a clone of the repository.
MOVED_TASKS = ("attention", "long_video", "scaling", "precision")
MOVED_OPTIONS = {"--peer": "peers", "--parts": "attention", "--devices": "scaling", "--videos": "precision"}


def _moved(word: str, command: str) -> NoReturn:
    raise UserError(
        f"`crosslmm profile {word}` is now `python -m perf {command}`, in a clone of the repository"
    )


class _MovedOption(argparse.Action):
    def __call__(self, *_: object, **__: object) -> NoReturn:
        (name,) = self.option_strings
        _moved(name, MOVED_OPTIONS[name])


def add_profile(commands: Commands) -> None:
    """Adds the parser of `profile` to `commands`, with one for each task; its `run` measures."""
    profile = commands.add_parser(
        "profile", help="time, FLOPs and peak memory, at real size with random weights"
    )
    tasks = profile.add_subparsers(title="tasks", metavar="TASK", dest="task", required=True)
    for task, line in TASKS.items():
        _add_task(tasks, task, line)
    _add_ask(tasks)
    for name in MOVED_TASKS:
        moved = tasks.add_parser(name, add_help=False, prefix_chars="+")  # takes whatever follows
        moved.add_argument("words", nargs="*")
        moved.set_defaults(run=lambda _, name=name: _moved(name, name))


def _add_task(tasks: Commands, task: str, line: str) -> None:
    """Adds a task that runs presets. All take all options, so that a wrong one can name its tasks."""
    parser = tasks.add_parser(task, help=line)
    add_measuring_options(parser)
    add_precision(parser)
    add_v2v_scope(parser)
    parser.add_argument(
        "--remat", nargs="+", default=[], choices=REMATS,
        help="what of the encoder is recomputed; each is measured (train)",
    )  # fmt: skip
    for name in MOVED_OPTIONS:
        parser.add_argument(name, nargs="*", action=_MovedOption, help=argparse.SUPPRESS)
    parser.set_defaults(run=_profile)


def _add_ask(tasks: Commands) -> None:
    """Adds the task that asks a MODEL folder, as `crosslmm ask` does."""
    ask = tasks.add_parser(
        "ask", help="a MODEL folder and a video file to an answer: a new process, and one that stays warm",
        epilog="The first process may compile programs, which it keeps on disk; the next ones are measured."
        " Then one process answers again, and watches the file with other frames and once more as before.",
    )  # fmt: skip
    ask.add_argument("model", metavar="MODEL", help="folder that `crosslmm train` or `crosslmm demo` wrote")
    ask.add_argument("video", metavar="VIDEO", help="a video file")
    ask.add_argument("--frames", type=int, metavar="N", help="frames to read (default: as in training)")
    ask.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer; default: 64"
    )
    ask.add_argument(
        "--other-video", metavar="VIDEO", help="of another length, watched in the warm process too"
    )
    ask.add_argument("--repeats", type=int, default=3, metavar="N", help="measured runs; default: 3")
    add_output_options(ask)
    ask.set_defaults(run=_profile_ask)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds where a report goes, and how long one system may take."""
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="per system; the rows it has by then are kept"
    )
    parser.add_argument("--json", metavar="-|PATH", help="- for only JSON on stdout")
    parser.add_argument("--markdown", metavar="PATH")
    parser.add_argument("--figure", metavar="PATH", help=".png, .svg or .pdf")


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all tasks take: systems, sizes, repetitions, outputs, and fields of the model."""
    parser.add_argument(
        "--preset", nargs="+", default=[], metavar="NAME", help="e.g. crosslmm_2b crosslmm_7b"
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[32, 64, 128, 256], metavar="N")
    parser.add_argument(
        "--tokens-per-frame", type=int, nargs="+", default=[None], metavar="N",
        help="1, 9 or 16 (default: the preset's)",
    )  # fmt: skip
    parser.add_argument("--text-tokens", type=int, default=64, metavar="N", help="of the prompt; default: 64")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs; default: 5")
    parser.add_argument(
        "--compile-jobs", type=int, default=1, metavar="N", help="programs compiled at the same time"
    )
    add_output_options(parser)
    parser.add_argument("--trace", metavar="DIR", help="a profile of one call of each case, for XProf")
    parser.add_argument("--set", action=Renamed)
    add_field_options(parser, ModelConfig)


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds --precision."""
    parser.add_argument(
        "--precision", nargs="+", choices=get_args(Precision), default=["compute"],
        help="of encoder, projector and T2V's cache; each is measured (encoder, prefill, decode); compute:"
        " bfloat16",
    )  # fmt: skip


def add_v2v_scope(parser: argparse.ArgumentParser) -> None:
    """Adds --v2v-scope."""
    parser.add_argument(
        "--v2v-scope", nargs="+", default=[], choices=SCOPES, help="each is measured (prefill)"
    )


def requests_of(
    args: argparse.Namespace, kind: "type[Request]", task: str, **options: object
) -> "list[Request]":
    """The requests of a command line: one for each preset, tokens per frame and precision.

    Args:
      args: parsed from `add_measuring_options`, and `add_precision` and `add_v2v_scope` if they were added.
      kind: the class of the requests.
      task: dotted name of the module that measures.
      options: further fields of the requests.
    """
    from crosslmm_jax.profiling import requests_for

    make = functools.partial(
        kind, task=task, frames=tuple(args.frames), overrides=tuple(args.overrides), text=args.text_tokens,
        v2v_scopes=tuple(getattr(args, "v2v_scope", ())), repeats=args.repeats,
        compile_jobs=args.compile_jobs, trace=args.trace, **options,
    )  # fmt: skip
    return requests_for(
        make, args.preset, tokens_per_frame=args.tokens_per_frame,
        precisions=getattr(args, "precision", ["compute"]),
    )  # fmt: skip


def outputs_of(args: argparse.Namespace) -> "Outputs":
    """Where the report goes."""
    from crosslmm_jax.profiling import Outputs

    return Outputs(json=args.json, markdown=args.markdown, figure=args.figure)


def _profile(args: argparse.Namespace) -> None:
    from crosslmm_jax.profiling import Request, profile

    for option, tasks in TASKS_OF_OPTIONS.items():
        if set(getattr(args, option)) - {"compute"} and args.task not in tasks:
            name = option.replace("_", "-")
            raise UserError(f"--{name} with {args.task}: give it with {', '.join(tasks)}")
    requests = requests_of(
        args, Request, f"crosslmm_jax.profiling.tasks.{args.task}", remats=tuple(args.remat),
        preallocate=args.task == "train",
    )  # fmt: skip
    command = shlex.join(["crosslmm", *sys.argv[1:]])
    profile(args.task, requests, command=command, outputs=outputs_of(args), timeout=args.timeout)


def _profile_ask(args: argparse.Namespace) -> None:
    from crosslmm_jax.profiling import AskRequest, ask, profile

    request = AskRequest(
        task="crosslmm_jax.profiling.tasks.ask", system=args.model, model=args.model, video=args.video,
        other_video=args.other_video, frames=() if args.frames is None else (args.frames,),
        max_new_tokens=args.max_new_tokens, repeats=args.repeats,
    )  # fmt: skip
    ask.check_paths(request)
    command = shlex.join(["crosslmm", *sys.argv[1:]])
    profile(
        "ask", [request], command=command, outputs=outputs_of(args), presentation=ask.PRESENTATION,
        timeout=args.timeout,
    )  # fmt: skip
