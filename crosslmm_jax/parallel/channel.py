"""Connections between the processes of a run: when one ends early, all end within seconds, and say why.

Process 0 is the hub; every other process holds one connection to it. A thread in each process serves them, so
a main thread that waits for a device or a disk stops nobody from leaving.

| what happens to a process | how the others know |
|---|---|
| an error | it sends its `Cause` to the hub, which sends it to all |
| it is killed | its system closes the connection |
| it is stopped, or its host is lost | it is silent for `silence_s` seconds |

Before jax starts, they meet on the port that jax's own service will use.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from crosslmm_jax.errors import STALLED, USER_MISTAKE, UserError

TICK_S = 1.0  # between two signs of life
LEAVE_S = 6.0  # that the hub waits for the others to leave, and others for the hub's answer
_RETRY_S = 0.2  # between two attempts to connect
_CONNECT_S = 10.0  # for one address of a host, which may have several
_HELLO_S = 5.0  # for the first message of a connection
_FREE_S = 10.0  # for an earlier run to leave the port
_LONG_S = 1e6  # the longest that sockets wait
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")

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
    """A connection to another process."""

    def __init__(self, process: int, host: str, connection: socket.socket) -> None:
        """`connection` is open."""
        self.process, self.host, self.connection = process, host, connection
        self.place = Place()
        self.heard = time.monotonic()
        self.at_end = self.knows_cause = False
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
                return None
            if messages is None:
                return None
            if messages:
                message, *self._messages = messages
                return message if isinstance(message, dict) else None
        return None

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


# ---- the start: all meet, with the same software ----


def meet(address: str, count: int, process: int, *, start_s: float) -> dict[int, Link]:
    """The connections of this process, once all processes are there.

    Args:
      address: host:port of process 0, which nothing uses yet.
      count: number of processes.
      process: index of this one.
      start_s: time for all to come; 0: no limit.

    Raises:
      Refused: a process has other software, or another number of processes; raised on all.
      TimeoutError: not all have come; names those that have not.
      UserError: the port cannot be used.
    """
    seconds = start_s or float("inf")
    host, _, port = address.rpartition(":")
    if process == 0:
        return _receive_all(int(port), count, seconds)
    return {0: _connect(host.strip("[]"), int(port), count, process, seconds)}


class Refused(Exception):
    """A process cannot take part in the run. `args[0]` is the `Cause`."""


def software() -> Message:
    """What must be the same on all hosts: versions, and a digest of each file of this package."""
    root = Path(__file__).parents[1]
    files = {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        for path in sorted(root.rglob("*.py"))
    }
    versions = {name: _version(name) for name in _PACKAGES}
    return {"versions": {"python": platform.python_version(), **versions}, "files": files}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _difference(here: Message, there: Message) -> str | None:
    """How the `hello` of a process differs from that of process 0, or None."""
    if here["count"] != there["count"]:
        return f"its NUM_PROCESSES is {there['count']}, and that of process 0 is {here['count']}"
    ours, theirs = here["software"], there["software"]
    for name, version in ours["versions"].items():
        if theirs["versions"].get(name) != version:
            return f"it has {name} {theirs['versions'].get(name)}, and process 0 has {version}"
    names = ours["files"].keys() | theirs["files"].keys()
    files = sorted(name for name in names if ours["files"].get(name) != theirs["files"].get(name))
    if not files:
        return None
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"its code is not that of process 0: crosslmm_jax/{', '.join(files[:3])}{more}"


def _hello(process: int, count: int) -> Message:
    return {"process": process, "host": socket.gethostname(), "count": count, "software": software()}


def _is_hello(message: Message) -> bool:
    count = message.get("count")
    return message.keys() == {"process", "host", "count", "software"} and (
        isinstance(count, int) and message["process"] in range(1, count)
    )


def _receive_all(port: int, count: int, seconds: float) -> dict[int, Link]:
    links: dict[int, Link] = {}
    ours, refusal = _hello(0, count), None
    deadline = time.monotonic() + seconds
    with _listen(port) as server:
        while len(links) < count - 1:
            server.settimeout(min(max(deadline - time.monotonic(), 0.001), _LONG_S))
            try:
                link = Link(-1, "", server.accept()[0])
            except TimeoutError:
                missing = [str(index) for index in range(1, count) if index not in links]
                more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
                raise TimeoutError(
                    f"process {', '.join(missing[:16])}{more} of {count} did not start within {seconds:.0f} s"
                    " (run.watchdog.start_s)"
                ) from None
            hello = link.first(_HELLO_S)
            if hello is None or not _is_hello(hello) or hello["process"] in links:
                link.connection.close()  # nothing of this run
                continue
            link.process, link.host = hello["process"], hello["host"]
            links[link.process] = link
            if refusal is None and (different := _difference(ours, hello)):
                text = f"{different}; give all hosts the same"
                refusal = Cause(link.process, link.host, USER_MISTAKE, text)
    for link in links.values():
        link.connection.setblocking(True)
        link.send(start=ours["host"], cause=refusal)
    if refusal is not None:
        raise Refused(refusal)
    return links


def _listen(port: int) -> socket.socket:
    """A socket on `port` of all addresses. It shares the port: jax's service takes it next.

    The service of another run would share it, too, and get processes of this one. So nobody may listen yet.
    """
    deadline = time.monotonic() + _FREE_S
    while _is_listened_to(port):
        if time.monotonic() > deadline:
            raise UserError(
                f"COORDINATOR_ADDRESS: port {port} is in use on this host; choose another one, or end the run"
                " that uses it"
            )
        time.sleep(_RETRY_S)
    dual = socket.has_dualstack_ipv6()
    server = socket.socket(socket.AF_INET6 if dual else socket.AF_INET)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if dual:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("", port))
        server.listen(4096)
    except OSError as error:
        server.close()
        raise UserError(f"COORDINATOR_ADDRESS: port {port}: {error.strerror}; choose another one") from error
    return server


def _is_listened_to(port: int) -> bool:
    try:
        socket.create_connection(("localhost", port), timeout=1).close()
    except OSError:
        return False
    return True


def _connect(host: str, port: int, count: int, process: int, seconds: float) -> Link:
    hello, deadline = _hello(process, count), time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(left, _CONNECT_S))
        except OSError:
            time.sleep(_RETRY_S)
            continue
        link = Link(0, host, connection)
        try:
            connection.sendall(json.dumps(hello).encode() + b"\n")
            answer = link.first(min(max(deadline - time.monotonic(), 0.001), _LONG_S))
        except OSError:
            answer = None
        if answer is None:  # process 0 waits for others still, or has ended
            connection.close()
            time.sleep(_RETRY_S)
            continue
        if answer["cause"] is not None:
            raise Refused(Cause(*answer["cause"]))
        link.host = answer["start"]
        return link
    raise TimeoutError(
        f"process 0 at {host}:{port} did not start within {seconds:.0f} s (run.watchdog.start_s), or not all"
        " of the others did"
    )
