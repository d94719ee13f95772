"""Connections between the processes of a run: when one ends early, all end within seconds, and say why.

Process 0 is the hub; every other process holds one connection to it. A thread in each process serves them, so
a main thread that waits for a device or a disk stops nobody from leaving.

| what happens to a process | how the others know |
|---|---|
| an error | it sends its `Cause` to the hub, which sends it to all |
| it is killed | its system closes the connection |
| it is stopped, or its host is lost | it is silent for `silence_s` seconds |

`meeting.py` makes the connections.
"""

import json
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from crosslmm_jax.errors import STALLED

TICK_S = 1.0  # between two signs of life
LEAVE_S = 6.0  # that the hub waits for the others to leave, and others for the hub's answer

Message = dict[str, Any]  # as JSON holds it


class Cause(NamedTuple):
    """Why a run ends early."""

    process: int
    host: str
    code: int  # exit code of all processes
    text: str
    phase: str = ""  # that has lasted too long

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host}: {self.text}"


class Place(NamedTuple):
    """Where a process is in its run."""

    step: int = 0
    phase: str = "start"

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}" if self.step else self.phase


class Link:
    """A connection to another process.

    Attributes:
      is_strange: whether the other side has sent what no process of ours sends.
    """

    def __init__(self, process: int, host: str, connection: socket.socket) -> None:
        """`connection` is open."""
        self.process, self.host, self.connection = process, host, connection
        self.place = Place()
        self.heard = time.monotonic()
        self.at_end = self.knows_cause = self.is_strange = False
        self._received = self._unsent = b""
        self._messages: list[Message] = []

    def send(self, **message: object) -> None:
        """Sends a message, or its beginning: the rest goes with the next one. Never waits.

        A place is dropped while a process does not read: the next one is newer.
        """
        if not (self._unsent and "place" in message):
            self._unsent += json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except OSError:
            pass  # whoever reads from this connection finds out

    def first(self, seconds: float) -> Message | None:
        """Waits for one message; None if the other side has closed, or sends nothing of ours."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.connection.settimeout(left)
            try:
                messages = self.receive()
            except (ValueError, RecursionError):  # of json
                self.is_strange = True
                return None
            if messages is None:
                self.is_strange = self._received != b""
                return None
            if messages:
                message, *self._messages = messages
                self.is_strange = not isinstance(message, dict)
                return None if self.is_strange else message
        return None

    def is_open(self) -> bool:
        """Whether the other side has not closed the connection. Reads nothing."""
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def receive(self) -> list[Message] | None:
        """The messages that have come since; None if the other side has closed."""
        if self._messages:
            return [self._messages.pop(0)]
        try:
            read = self.connection.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not read:
            return None
        self.heard = time.monotonic()
        *lines, self._received = (self._received + read).split(b"\n")
        return [json.loads(line) for line in lines]


class Channel:
    """The connections of this process, and the thread that serves them.

    Attributes:
      place: where this process is; its main thread sets it.
    """

    def __init__(
        self, process: int, links: Mapping[int, Link], *, silence_s: float, on_cause: Callable[[Cause], None]
    ) -> None:
        """Starts the thread.

        Args:
          process: index of this process.
          links: to all others for process 0, to process 0 for all others.
          silence_s: after which a process is taken for lost; 0: never.
          on_cause: says why the run ends, in the thread; then the thread ends the process.
        """
        self.place = Place()
        self._process, self._links = process, dict(links)
        self._silence_s, self._on_cause = silence_s, on_cause
        self._causes: queue.SimpleQueue[Cause] = queue.SimpleQueue()
        self._at_end, self._all_at_end, self._closed = False, threading.Event(), False
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        for link in self._links.values():
            link.connection.setblocking(False)
            self._selector.register(link.connection, selectors.EVENT_READ, link)
        self._thread = threading.Thread(target=self._work, name="channel", daemon=True)
        self._thread.start()

    def leave(self, cause: Cause) -> None:
        """Makes all processes end; returns only if the thread could not do it."""
        self._causes.put(cause)
        self._wake()
        self._thread.join(3 * LEAVE_S)

    def wait_for_all(self, seconds: float | None) -> bool:
        """Returns True once all processes have called this; they may then leave in any order."""
        self._at_end = True
        self._wake()
        return self._all_at_end.wait(seconds)

    def absent(self, phase: str) -> str:
        """On process 0: which processes are behind the others, for people."""
        places = {link.process: (link.host, link.place) for link in self._links.values()}
        places[self._process] = (socket.gethostname(), self.place)
        newest = max(place.step for _, place in places.values())
        behind = {key: value for key, value in places.items() if value[1].step < newest}
        behind = behind or {key: value for key, value in places.items() if value[1].phase != phase}
        if not behind:
            return f"all {len(places)} processes have reached it"
        named = [f"process {key} on host {host} ({at})" for key, (host, at) in sorted(behind.items())]
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        return f"not there yet: {', '.join(named[:8])}{more}"

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        self._wake()
        self._thread.join(LEAVE_S)
        for link in self._links.values():
            link.connection.close()

    def _wake(self) -> None:
        self._waker.send(b"x")

    def _work(self) -> None:
        try:
            self._serve()
        except Exception as error:  # a process without its channel would be waited for
            self._leave(Cause(self._process, socket.gethostname(), 1, f"its channel failed: {error!r}"))

    def _serve(self) -> None:
        looked = time.monotonic()
        sent = 0.0
        while not self._closed:
            for key, _ in self._selector.select(TICK_S / 2):
                if key.data is None:
                    self._woken.recv(1 << 10)
                elif (cause := self._read(key.data)) is not None:
                    self._causes.put(cause)
            now = time.monotonic()
            if now - looked > 5 * TICK_S:  # this process was stopped, not the others
                for link in self._links.values():
                    link.heard = now
            looked = now
            if not self._causes.empty():
                self._leave(self._causes.get())
            if self._at_end and not self._all_at_end.is_set():
                self._tell_of_end()
            if now - sent >= TICK_S:
                sent = now
                for link in self._links.values():
                    link.send(place=self.place)
            if self._silence_s and not self._all_at_end.is_set():
                self._check_silence(now)

    def _read(self, link: Link) -> Cause | None:
        """Acts on the messages of `link`; returns why the run must end, if it must."""
        messages = link.receive()
        if messages is None:
            self._selector.unregister(link.connection)
            if link.at_end or self._all_at_end.is_set():
                return None
            return Cause(
                link.process, link.host, STALLED,
                "gone: it was killed or has crashed, or its host was lost; the same command resumes",
            )  # fmt: skip
        for message in messages:
            if "cause" in message:
                link.knows_cause = True
                return Cause(*message["cause"])
            if "place" in message:
                link.place = Place(*message["place"])
            if "end" in message:
                link.at_end = True
                if self._process != 0:
                    self._all_at_end.set()
        return None

    def _tell_of_end(self) -> None:
        if self._process != 0:
            self._links[0].send(end=True)
            return
        if all(link.at_end for link in self._links.values()):
            for link in self._links.values():
                link.send(end=True)
            self._all_at_end.set()

    def _check_silence(self, now: float) -> None:
        for link in self._links.values():
            if not link.at_end and now - link.heard > self._silence_s:
                self._causes.put(
                    Cause(
                        link.process, link.host, STALLED,
                        f"no sign of life for {self._silence_s:.0f} s (run.watchdog.silence_s): it is"
                        " stopped, or its host or network is lost; the same command resumes",
                    )
                )  # fmt: skip
                self._wake()
                return

    def _leave(self, cause: Cause) -> NoReturn:
        """Tells the others, says why, and ends the process when they have heard it."""
        if self._process == 0 and cause.phase:
            cause = cause._replace(text=f"{cause.text}; {self.absent(cause.phase)}", phase="")
        for link in self._links.values():
            link.send(cause=cause)
        self._on_cause(cause)
        if self._process in (0, cause.process):
            self._wait_until_heard(cause)
        os._exit(cause.code)

    def _wait_until_heard(self, cause: Cause) -> None:
        """Waits until the others have left, or for the hub's answer; at most LEAVE_S.

        Process 0 must be the last: jax ends all others by SIGABRT when it is gone.
        """
        deadline = time.monotonic() + LEAVE_S
        for link in self._links.values():
            while link.process != cause.process and (left := deadline - time.monotonic()) > 0:
                if link.knows_cause and self._process != 0:
                    break
                link.connection.settimeout(left)
                messages = link.receive()
                if messages is None:
                    break
                link.knows_cause |= any("cause" in message for message in messages)
