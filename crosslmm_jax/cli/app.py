"""The `crosslmm` command: builds the parser and runs the chosen command.

Nothing heavy is imported here, so that `crosslmm --help` answers at once. A user's mistake ends with one line
on stderr and exit code 2; `--debug` adds the traceback.
"""

import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence

import crosslmm_jax
from crosslmm_jax.cli.ask import add_ask_and_chat
from crosslmm_jax.cli.convert import add_convert
from crosslmm_jax.cli.data import add_data
from crosslmm_jax.cli.demo import add_demo
from crosslmm_jax.cli.export import add_export
from crosslmm_jax.cli.options import OneLineParser, drop_output
from crosslmm_jax.cli.params import add_params
from crosslmm_jax.cli.plan import add_plan
from crosslmm_jax.cli.profile import add_profile
from crosslmm_jax.cli.train import add_train
from crosslmm_jax.cli.watch import add_watch
from crosslmm_jax.errors import (
    INTERRUPTED,
    STALLED,
    USER_MISTAKE,
    FailedElsewhere,
    Interrupted,
    Stalled,
    UserError,
)
from crosslmm_jax.parallel import compilation_cache, processes, xla_flags

# Commands that compile nothing worth keeping; and `train`, for the reason in `compilation_cache`.
WITHOUT_COMPILATION_CACHE = ("data", "export", "params", "plan", "train", "watch")
NOT_READ = 141  # exit code, 128 + SIGPIPE


def build_parser() -> OneLineParser:
    """Builds the parser of all commands; `args.run` of its result is the function to call."""
    parser = OneLineParser(prog="crosslmm", description="CrossLMM: train it and ask it about long videos.")
    parser.add_argument("--version", action="version", version=f"crosslmm_jax {crosslmm_jax.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    add_demo(commands)
    add_params(commands)
    add_plan(commands)
    add_data(commands)
    add_convert(commands)
    add_profile(commands)
    add_train(commands)
    add_export(commands)
    add_watch(commands)
    add_ask_and_chat(commands)
    return parser


def _take_debug(words: list[str]) -> bool:
    """Removes `--debug` from `words` up to `--`: `train` would read it as an override."""
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words[:end] = [word for word in words[:end] if word != "--debug"]
    return debug


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(words)
    try:
        return _run(words)
    except KeyboardInterrupt as stop:
        if debug:
            traceback.print_exc()
        if processes.several() and not isinstance(stop, Interrupted):
            processes.leave(INTERRUPTED, str(stop) or "interrupted; the same command goes on")
        if str(stop):  # training says what it saved, or what is lost
            print(f"crosslmm: {stop}", file=sys.stderr)
        if argv is None:
            _end_at_next_interrupt(stop)
        return INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise
        drop_output()
        return NOT_READ
    except Exception as error:
        ours = isinstance(error, (UserError, Stalled))
        mistake = error if ours else _output_error(error) or _absent_platform()
        if mistake is None:
            raise
        if debug:
            traceback.print_exc()
        code = STALLED if isinstance(mistake, Stalled) else USER_MISTAKE
        text = " ".join(str(mistake).split())
        if processes.several():
            processes.leave(code, text, follows=isinstance(mistake, FailedElsewhere))
        print(f"crosslmm: error: {text}", file=sys.stderr)
        return code


def _run(words: list[str]) -> int:
    """Runs a command line and returns its exit code. What stdout does not take is an error of this call."""
    try:
        _check_words(words)
        args = build_parser().parse_args(words)
        # Before a room imports jax, which reads the environment once.
        xla_flags.apply(os.environ)
        if args.command not in WITHOUT_COMPILATION_CACHE:
            compilation_cache.apply(os.environ)
        code = args.run(args) or 0
    except SystemExit:  # of --help and --version, which have printed
        sys.stdout.flush()
        raise
    sys.stdout.flush()  # so that a closed pipe or a full disk is met here, and not when Python ends
    return code


def _end_at_next_interrupt(stop: KeyboardInterrupt) -> None:
    """Makes a second Ctrl-C end the process at once, without the traceback of what it interrupts.

    If the second one has come already, while the first was on its way here, ends the process.
    """
    before = stop.__context__
    while before is not None and not isinstance(before, KeyboardInterrupt):
        before = before.__context__
    if before is not None:
        sys.stdout.flush()
        os._exit(INTERRUPTED)
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # Python still waits for its threads


def _nobody_reads_stdout() -> bool:
    """Whether stdout is a pipe whose reader has left, as `| head` does."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # 0: only errors are reported
    return bool(poll.poll(0))


def _output_error(error: Exception) -> UserError | None:
    """The reason if stdout cannot be written, as on a full disk."""
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    try:
        print(flush=True)  # the buffer may have lost what could not be written, so another line is tried
    except OSError as error:
        drop_output()
        return UserError(f"stdout: {error.strerror or error}; write the output to a disk with space")
    return None


def _check_words(words: Sequence[str]) -> None:
    """Raises a `UserError` for a word whose bytes are no text: no file that is written could hold it."""
    for number, word in enumerate(words, start=1):
        if any("\udc80" <= character <= "\udcff" for character in word):
            raise UserError(
                f"word {number} after crosslmm is {os.fsencode(word)!r}, which is not UTF-8; rename the file,"
                " or set the terminal to UTF-8"
            )


def _absent_platform() -> UserError | None:
    """The reason if jax cannot start because of JAX_PLATFORMS, of which it has errors of several types."""
    wanted = os.environ.get("JAX_PLATFORMS")
    if not wanted or "jax" not in sys.modules:
        return None
    try:
        sys.modules["jax"].devices()
    except Exception as error:
        reason = (str(error).splitlines() or ["jax has no support for it installed"])[0]
        return UserError(f"JAX_PLATFORMS is {wanted!r}, which is not there ({reason}); unset it, or try cpu")
    return None
