"""Start and end of the processes of a run. Importable without jax.

start           `initialize_processes`: they meet (`meeting.py`), then jax joins them
the usual end   all wait for each other, then jax leaves them: no process finds another one gone
an early end    `leave`: all end within seconds, with one line and one exit code, without jax's own barrier,
                in which a process that fails would wait for all others
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn

from crosslmm_jax.config import WatchdogConfig
from crosslmm_jax.errors import INTERRUPTED, STALLED, Stalled, first_line
from crosslmm_jax.parallel.channel import Cause, Channel, Place
from crosslmm_jax.parallel.meeting import Refused, meet
from crosslmm_jax.parallel.rank import Rank, find_rank

SYMPTOM_S = 3.0  # an error may only follow from another process's end, which is known by then
_LAST_WORDS_S = 3.0
_LATE_WARNING_S = 0.3  # in which XLA's threads write their last warnings
# jax's own limits, after which it ends a process by SIGABRT. The channel knows of a lost process before.
_JAX_HEARTBEAT_S, _JAX_SHUTDOWN_S = 100, 60
_PREEMPTION_KEY = (
    "RECEIVED_PREEMPTION_NOTICE"  # of XLA's preemption_sync_manager.cc, in jax's key-value store
)

_channel: Channel | None = None
_limits = WatchdogConfig()
_process, _is_of_several = 0, False
_last_words: list[Callable[[int], None]] = []


def initialize_processes(limits: WatchdogConfig | None = None) -> None:
    """Joins the processes of one run, before any other use of jax; does nothing for a single process.

    Raises:
      ConfigError: the environment does not say which process this is; see `rank.find_rank`.
      UserError: the port of process 0 cannot be used.
      Stalled: not all processes have started within `limits.start_s` seconds.
    """
    rank = None if several() else find_rank()
    if rank is not None:
        _join(rank, limits or WatchdogConfig())


def _join(rank: Rank, limits: WatchdogConfig) -> None:
    global _channel, _limits, _process, _is_of_several
    import jax

    address, count, index = rank
    _limits, _process, _is_of_several = limits, index, True
    try:
        links = meet(address, count, index, start_s=limits.start_s)
    except Refused as refused:
        _say(refused.args[0])
        os._exit(refused.args[0].code)
    except TimeoutError as late:
        here = f"process {index} on host {socket.gethostname()}"
        raise Stalled(f"{here}: {late} (run.watchdog.start_s); start all of them again") from None
    _channel = Channel(index, links, silence_s=limits.silence_s, on_cause=_say)
    _delay_abort()
    sys.excepthook = _leave_after(sys.excepthook)
    atexit.register(_end)  # runs before jax's own, which was registered before
    jax.distributed.initialize(
        address, num_processes=count, process_id=index,
        # Under SLURM, jax would choose one GPU by SLURM_LOCALID, which may be invisible, or one of several
        # that this process has. launch/_env.sh chooses.
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=max(_JAX_HEARTBEAT_S, 3 * round(limits.silence_s)),
        shutdown_timeout_seconds=_JAX_SHUTDOWN_S,
    )  # fmt: skip


def _delay_abort() -> None:
    """Makes an abort take 6 seconds: its handler is `sleep`, and a handler's argument is the signal's number.

    jax aborts a process at once when process 0 is gone. The channel's thread, which says why and gives the
    right exit code, may need a moment more.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def several() -> bool:
    """Whether this process is one of several that have been joined."""
    return _channel is not None


def index() -> int:
    """Index of this process among those that have been joined; 0 for a single one. Does not start jax."""
    return _process


def wait_for_preemption_notice(*, seconds: float) -> bool:
    """Waits until one of several processes gets SIGTERM; False after some seconds, or if jax has ended."""
    from jax._src import distributed  # its store has no public name

    client = distributed.global_state.client
    if client is None:
        return False
    begin = time.monotonic()
    try:
        client.blocking_key_value_get(_PREEMPTION_KEY, round(1000 * seconds))
        return True
    except Exception:  # of a type that jaxlib does not name: the time is over, or jax has ended
        time.sleep(max(min(begin + 1 - time.monotonic(), 1), 0))
        return False


def set_place(step: int, phase: str) -> None:
    """Lets the other processes know where this one is."""
    if _channel is not None:
        _channel.place = Place(step, phase)


def on_early_end(action: Callable[[int], None]) -> Callable[[], None]:
    """Calls `action` with the exit code before an early end of this process. Returns what undoes this."""
    _last_words.append(action)
    return lambda: _last_words.remove(action)


def leave(code: int, text: str, *, phase: str = "", follows: bool = False) -> NoReturn:
    """Ends this process and all others of the run at once, with one line on stderr each.

    Args:
      code: the exit code of all.
      text: why, and what to do; one line.
      phase: of the run, that has lasted too long: the line then names the processes that are not in it.
      follows: whether this may only follow from what another process does: its cause then comes first.
    """
    cause = Cause(_process, socket.gethostname(), code, text, phase)
    if _channel is not None:
        if follows:
            time.sleep(SYMPTOM_S)  # the channel's thread ends this process as soon as it knows the cause
        _channel.leave(cause)
    _say(cause)
    os._exit(code)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Drops what is written to stderr, also by C++; errors that are raised are not touched."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _end() -> None:
    """The usual end: all wait for each other."""
    global _channel
    if _channel is None:
        return
    import jax

    set_place(_channel.place.step, "end")
    if not _channel.wait_for_all(_limits.end_s or None):
        text = f"the processes did not all come to the end within {_limits.end_s:.0f} s (run.watchdog.end_s)"
        leave(STALLED, text, phase="end")
    with _no_stderr():  # XLA warns of each process that it stops to watch (WatchTasksAsync ... CANCELLED)
        jax.distributed.shutdown()
        time.sleep(_LATE_WARNING_S)
    _channel.close()
    _channel = None


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def _leave_after(hook: Hook) -> Hook:
    """A `sys.excepthook` that ends all processes after an error that nothing has caught."""

    def leave_after(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            leave(INTERRUPTED, "interrupted, not saved")
        time.sleep(SYMPTOM_S)
        hook(kind, error, trace)
        leave(1, f"{kind.__name__}: {first_line(error)}")

    return leave_after


def _say(cause: Cause) -> None:
    """The line about an early end, and what else has to be done before; whatever hangs is left behind."""
    text = cause if _is_of_several else cause.text
    line = f"crosslmm: {'' if cause.code == INTERRUPTED else 'error: '}{text}\n"
    threads = [threading.Thread(target=_write, args=(line,), daemon=True)]
    threads += [threading.Thread(target=action, args=(cause.code,), daemon=True) for action in _last_words]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _LAST_WORDS_S
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))


def _write(line: str) -> None:
    sys.stdout.flush()
    os.write(sys.stderr.fileno(), line.encode())
