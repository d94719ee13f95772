"""The owner of a run folder: one process at a time trains in it.

    RUN/owner.json    who the owner is; its modification time is the owner's heartbeat

A second run in the same folder is refused while the first lives. The owner is dead

    on the same machine    when its process is gone, or another process has its number
    on another one         when its heartbeat is STALE_S old

Shared file systems may lack locks, so none are used: a file appears whole by a hard link, which fails when
the name is taken. Ages are differences of two modification times that the same file system gave, so that the
clocks of hosts need not agree. Should a process that was taken for dead wake up, it ends before it saves.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from crosslmm_jax.errors import UserError

OWNER_FILE = "owner.json"
HEARTBEAT_S = 5.0
STALE_S = 30.0
SHARED_S = 60.0  # after which a network file system shows a new file on all hosts
_LOOK_S = 0.5  # between two looks at a heartbeat

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Process:
    """A process of some host, told apart from later ones with its number."""

    host: str
    machine: str  # boot and process namespace in which `pid` means this process; "" if that is not known
    pid: int
    started: int  # clock ticks from boot to the start of the process

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"

    def lives(self) -> bool | None:
        """Whether the process runs; None if that cannot be seen from here."""
        if not self.machine or self.machine != _machine():
            return None
        started = _start_of(self.pid)
        if started is not None:
            return started == self.started
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            return None  # of another user, and hidden
        except ProcessLookupError:
            pass
        return False


def this_process() -> Process:
    """The process that calls this."""
    pid = os.getpid()
    return Process(host=socket.gethostname(), machine=_machine(), pid=pid, started=_start_of(pid) or 0)


def _machine() -> str:
    """Where process numbers mean the same processes: containers of one host have numbers of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if there is none, or a dead one."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


class _Seen(NamedTuple):
    """An owner file as it was at one time."""

    token: str  # of its claim; "" while the file is being written
    process: Process | None
    heartbeat: float  # seconds, by the clock of the file system

    def __str__(self) -> str:
        return str(self.process or "another process")


class RunOwner:
    """Makes this process the owner of a run folder, from `claim` to `release`.

    Attributes:
      claimed_by: names this claim.
    """

    def __init__(self, folder: Path) -> None:
        """Touches nothing yet."""
        self._folder, self._path = folder, folder / OWNER_FILE
        self._token = self.claimed_by = uuid.uuid4().hex
        self._mine = folder / f".{OWNER_FILE}.{self._token}"  # before it is linked
        self._released = threading.Event()
        self._heartbeats: threading.Thread | None = None

    def claim(self) -> None:
        """Becomes the owner. Waits for the heartbeat of an owner on another machine, and says so.

        Raises:
          UserError: another process owns the folder, or the folder cannot be written.
        """
        try:
            self._put()
        except OSError as error:
            reason = error.strerror or error
            fix = "free space there" if error.errno == errno.ENOSPC else "name a folder that can be written"
            raise UserError(f"run.out {self._folder}: {reason}; {fix}") from error
        self._heartbeats = threading.Thread(target=self._beat, name="run-owner", daemon=True)
        self._heartbeats.start()

    def check_shared(self, claimed_by: str) -> None:
        """Raises a UserError where the claim of process 0 is not seen: the folder is another one there."""
        deadline = time.monotonic() + SHARED_S
        while True:
            with contextlib.suppress(OSError):
                seen = _look(self._path)
                if seen is not None and seen.token == claimed_by:
                    return
            if time.monotonic() > deadline:
                raise UserError(
                    f"run.out {self._folder}: this host does not see what process 0 writes there; name a"
                    " folder that all hosts share"
                )
            time.sleep(_LOOK_S)

    def check(self) -> None:
        """Raises a UserError when another process has taken the folder over."""
        try:
            seen = _look(self._path)
        except OSError:
            return  # a folder that cannot be read now says nothing
        if seen is not None and seen.token != self._token:
            raise UserError(
                f"run.out {self._folder}: {seen} has taken this folder over, since this process gave no sign"
                f" of life for {STALE_S:.0f} s; this one ends, and its checkpoints are kept"
            )

    def release(self) -> None:
        """Ends the ownership, if it has begun and nobody has taken it over."""
        if self._heartbeats is None:
            return
        self._released.set()
        self._heartbeats.join(1)  # a file system that hangs is left behind
        with contextlib.suppress(OSError):
            if (seen := _look(self._path)) is not None and seen.token == self._token:
                self._path.unlink()

    def _put(self) -> None:
        """Puts this process's owner file in place, once no living process has one there."""
        content = {"token": self._token, **dataclasses.asdict(this_process())}
        self._mine.write_text(json.dumps(content) + "\n", encoding="utf-8")
        try:
            while not self._link():
                seen = _look(self._path)
                if seen is not None and self._is_dead(seen):
                    self._remove(seen)
        finally:
            self._mine.unlink(missing_ok=True)

    def _link(self) -> bool:
        """Gives the owner file its name, unless the name is taken."""
        try:
            os.link(self._mine, self._path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost: it may have been this process's link.
            return os.stat(self._mine).st_nlink > 1
        except OSError:  # a file system without hard links
            try:
                with self._path.open("x", encoding="utf-8") as file:
                    file.write(self._mine.read_text(encoding="utf-8"))
            except FileExistsError:
                return False
        return True

    def _is_dead(self, first: _Seen) -> bool:
        """Whether the owner is dead. False if its file has changed hands: look again.

        Raises:
          UserError: it lives.
        """
        lives = None if first.process is None else first.process.lives()
        if lives is not None:
            if lives:
                raise self._refusal(first)
            return True
        begin, said = time.monotonic(), False
        while (age := self._now() - first.heartbeat) < STALE_S and time.monotonic() - begin < STALE_S:
            if not said:
                said = True
                logger.warning(
                    "run.out %s: %s trained here %.0f s ago; waiting up to %.0f s for a sign of its life",
                    self._folder, first, max(age, 0), min(STALE_S - age, STALE_S),
                )  # fmt: skip
            time.sleep(_LOOK_S)
            seen = _look(self._path)
            if seen is None or seen.token != first.token:
                return False
            if seen.heartbeat != first.heartbeat:
                raise self._refusal(seen)
        return True

    def _refusal(self, owner: _Seen) -> UserError:
        return UserError(
            f"run.out {self._folder}: {owner} is training in this folder; wait until it has ended or end it,"
            " or choose another run.out"
        )

    def _now(self) -> float:
        """The time by the clock of the file system."""
        os.utime(self._mine)
        return os.stat(self._mine).st_mtime

    def _remove(self, dead: _Seen) -> None:
        """Removes a dead owner's file, if it is still the one that was seen.

        Only one process at a time may remove it, or a slow one would remove the file of a faster one.
        """
        removing = self._folder / f".{OWNER_FILE}.removing"
        try:
            removing.mkdir()
        except FileExistsError:
            with contextlib.suppress(OSError):  # of a process that was killed just then, or gone by now
                if self._now() - removing.stat().st_mtime >= STALE_S:
                    removing.rmdir()
            time.sleep(0.01)
            return
        try:
            if _look(self._path) == dead:
                self._path.unlink()
        finally:
            removing.rmdir()

    def _beat(self) -> None:
        """Renews the heartbeat, which needs no disk space, and the file if somebody has deleted it."""
        while not self._released.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, UserError):
                with contextlib.suppress(FileNotFoundError), self._path.open("r+b") as file:
                    if _token_in(file.read()) == self._token:
                        os.utime(file.fileno())
                    continue
                self._put()


def _look(path: Path) -> _Seen | None:
    """The owner file at `path`, or None if there is none. By opening it: NFS then asks its server."""
    try:
        with path.open("rb") as file:
            content, heartbeat = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        fields = json.loads(content)
        token = fields.pop("token")
        return _Seen(token, Process(**fields), heartbeat)
    except (ValueError, TypeError, KeyError, AttributeError):
        return _Seen("", None, heartbeat)


def _token_in(content: bytes) -> str:
    try:
        return str(json.loads(content)["token"])
    except (ValueError, TypeError, KeyError):
        return ""
