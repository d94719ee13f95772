"""The start of a run: its processes meet, compare what must be the same, and stay connected.

They meet before jax starts, on the port of process 0 that jax's own service uses afterwards. Processes that
cannot be one run end within seconds, all that are there: those with different software or NUM_PROCESSES, or
with the same PROCESS_ID.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import socket
import threading
import time
import uuid
from pathlib import Path

from crosslmm_jax.errors import USER_MISTAKE, UserError
from crosslmm_jax.parallel.channel import TICK_S, Cause, Link, Message

_RETRY_S = 0.2  # between two attempts to connect
_CONNECT_S = 10.0  # for one address of a host, which may have several
_HELLO_S = 5.0  # for the first message of a connection
_FREE_S = 10.0  # for an earlier run to leave the port
_OCCUPIED_S = 1.5 * _FREE_S  # after which something that speaks on the port stays there
_QUIET_S = 5.0  # without a newcomer, after which a refusal has reached all who come
_LONG_S = 1e6  # the longest that sockets wait
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")


class Refused(Exception):
    """These processes cannot be one run. `args[0]` is the `Cause`."""


def meet(address: str, count: int, process: int, *, start_s: float) -> dict[int, Link]:
    """The connections of this process, once all processes are there.

    Args:
      address: host:port of process 0, which nothing uses yet.
      count: number of processes.
      process: index of this one.
      start_s: time for all to come; 0: no limit.

    Raises:
      Refused: a process has other software, another number of processes, or the index of another one; raised
        on all that are there.
      TimeoutError: not all have come; names those that have not.
      UserError: the port cannot be used, or the run there has started without this process.
    """
    seconds = start_s or float("inf")
    host, _, port = address.rpartition(":")
    host, hello = host.strip("[]"), _hello(process, count)
    if process == 0:
        return _Hub(host, int(port), hello).receive_all(seconds)
    return {0: _connect(host, int(port), hello, seconds, threading.Event())}


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
    return {
        "process": process, "count": count, "host": socket.gethostname(), "software": software(),
        "token": uuid.uuid4().hex,
    }  # fmt: skip


def _is_hello(message: Message) -> bool:
    count = message.get("count")
    return message.keys() == {"process", "count", "host", "software", "token"} and (
        isinstance(count, int) and message["process"] in range(count)
    )


class _Hub:
    """The meeting, on process 0."""

    def __init__(self, host: str, port: int, hello: Message) -> None:
        self._host, self._port, self._hello = host, port, hello
        self._count: int = hello["count"]
        self._expected = self._count  # processes by the highest NUM_PROCESSES of all
        self._links: dict[int, Link] = {}
        self._present: list[Link] = []  # also processes that have an index in common
        self._refusal: Cause | None = None
        self._ended = threading.Event()

    def receive_all(self, seconds: float) -> dict[int, Link]:
        """See `meet`."""
        deadline = time.monotonic() + seconds
        with _listen(self._port, self._hello) as server:
            threading.Thread(target=self._look_for_another, name="meeting", daemon=True).start()
            try:
                while self._refusal is None and len(self._links) < self._count - 1:
                    if (left := deadline - time.monotonic()) <= 0:
                        raise TimeoutError(f"{self._missing()} did not start within {seconds:.0f} s")
                    self._accept(server, min(left, TICK_S))
            finally:
                self._ended.set()
            if self._refusal is not None:
                self._refuse_newcomers(server)
                raise Refused(self._refusal)
        for link in self._links.values():
            self._answer(link)
        return self._links

    def _missing(self) -> str:
        missing = [str(index) for index in range(1, self._count) if index not in self._links]
        more = f" and {len(missing) - 16} more" if len(missing) > 16 else ""
        return f"process {', '.join(missing[:16])}{more} of {self._count}"

    def _accept(self, server: socket.socket, seconds: float) -> bool:
        """Waits for a process; False if none has come."""
        server.settimeout(seconds)
        try:
            link = Link(-1, "", server.accept()[0])
        except TimeoutError:
            return False
        hello = link.first(_HELLO_S)
        if hello is None or not _is_hello(hello):
            link.connection.close()  # nothing of this run
            return False
        if hello["token"] == self._hello["token"]:  # this process, which looks for another one
            self._answer(link)
            link.connection.close()
            return False
        link.process, link.host = hello["process"], hello["host"]
        self._refusal = self._refusal or self._reason_to_refuse(link, hello)
        self._expected = max(self._expected, hello["count"])
        self._present.append(link)
        self._links[link.process] = link
        return True

    def _reason_to_refuse(self, link: Link, hello: Message) -> Cause | None:
        before = self._links.get(link.process)
        if different := _difference(self._hello, hello):
            text = f"{different}; give all hosts the same"
        elif link.process == 0 or (before is not None and before.is_open()):
            other = self._hello["host"] if before is None else before.host
            text = (
                f"PROCESS_ID is {link.process} here, and for another process on host {other}; give each of"
                f" the {self._count} processes its own, 0 to {self._count - 1}"
            )
        else:
            return None
        return Cause(link.process, link.host, USER_MISTAKE, text)

    def _refuse_newcomers(self, server: socket.socket) -> None:
        """Says why to all that are there, and to those that still come."""
        while True:
            for link in self._present:
                self._answer(link)
            self._present.clear()
            if self._links.keys() >= set(range(1, self._expected)) or not self._comes(server):
                return

    def _comes(self, server: socket.socket) -> bool:
        deadline = time.monotonic() + _QUIET_S
        while (left := deadline - time.monotonic()) > 0:
            if self._accept(server, left):
                return True
        return False

    def _answer(self, link: Link) -> None:
        link.connection.setblocking(True)
        link.send(start=self._hello["host"], cause=self._refusal)

    def _look_for_another(self) -> None:
        """Connects to the address of process 0 time and again: who answers must be this process."""
        try:
            while not self._ended.wait(TICK_S):
                _connect(self._host, self._port, self._hello, _LONG_S, self._ended).connection.close()
        except Refused as refused:
            self._refusal = self._refusal or refused.args[0]
        except UserError as error:
            self._refusal = self._refusal or Cause(0, self._hello["host"], USER_MISTAKE, str(error))
        except TimeoutError:
            pass


def _listen(port: int, hello: Message) -> socket.socket:
    """A socket on `port` of all addresses. It shares the port: jax's service takes it next.

    The service of another run would share it, too, and get processes of this one. So nobody may listen yet.
    """
    deadline = time.monotonic() + _FREE_S
    while _is_listened_to(port, hello):
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


def _is_listened_to(port: int, hello: Message) -> bool:
    """Whether something listens; raises `Refused` if it is another process 0."""
    try:
        connection = socket.create_connection(("localhost", port), timeout=1)
    except OSError:
        return False
    with connection:
        _ask(Link(0, "localhost", connection), hello, 1)
    return True


def _connect(host: str, port: int, hello: Message, seconds: float, ended: threading.Event) -> Link:
    """The connection to process 0, which has answered `hello`. Gives up once `ended` is set."""
    deadline = time.monotonic() + seconds
    occupied_since = float("inf")
    while not ended.is_set() and (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(left, _CONNECT_S))
        except OSError:
            occupied_since = float("inf")
            ended.wait(_RETRY_S)
            continue
        link = Link(0, host, connection)
        if (answer := _ask(link, hello, min(left, _LONG_S))) is not None:
            link.host = answer["start"]
            return link
        connection.close()  # process 0 has ended, or its run has started and jax's service answers
        now = time.monotonic()
        occupied_since = min(occupied_since, now) if link.is_strange else float("inf")
        if now - occupied_since > _OCCUPIED_S:
            raise UserError(
                f"COORDINATOR_ADDRESS {host}:{port}: a run has started there without this process, whose"
                f" PROCESS_ID is {hello['process']} and whose NUM_PROCESSES is {hello['count']}; give each"
                f" process of a run its own PROCESS_ID, 0 to {hello['count'] - 1}, and the same"
                " NUM_PROCESSES, or choose another port"
            )
        ended.wait(_RETRY_S)
    raise TimeoutError(
        f"process 0 at {host}:{port} did not start within {seconds:.0f} s, or not all of the others did"
    )


def _ask(link: Link, hello: Message, seconds: float) -> Message | None:
    """The answer of process 0 to `hello`, or None; raises `Refused` if that is the answer."""
    with contextlib.suppress(OSError):  # the other side has closed, maybe after an answer
        link.connection.sendall(json.dumps(hello).encode() + b"\n")
    answer = link.first(seconds)
    if answer is None or not answer.keys() >= {"start", "cause"}:
        return None
    if answer["cause"] is not None:
        raise Refused(Cause(*answer["cause"]))
    return answer
