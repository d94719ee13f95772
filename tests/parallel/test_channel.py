"""The meeting of processes, and what their connections stand. Threads play the processes."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.parallel import channel
from crosslmm_jax.parallel.channel import Link, Refused, meet
from crosslmm_jax.parallel.rank import find_rank

SOFTWARE = {"versions": {"python": "3"}, "files": {"a.py": "1"}}


@pytest.fixture(autouse=True)
def same_software(monkeypatch) -> None:
    monkeypatch.setattr(channel, "software", lambda: SOFTWARE)


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Link(0, "a", ours), Link(1, "b", theirs)


def connect(port: int) -> socket.socket:
    """A connection to process 0, once it listens."""
    for _ in range(200):
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            time.sleep(0.02)
    raise AssertionError("nobody listens")


def close(links: dict[int, Link]) -> None:
    for link in links.values():
        link.connection.close()


def test_64_processes_meet(free_port) -> None:
    address = f"localhost:{free_port()}"
    with ThreadPoolExecutor(64) as threads:
        runs = [threads.submit(meet, address, 64, i, start_s=60) for i in reversed(range(64))]
        links = [run.result() for run in reversed(runs)]
    assert sorted(links[0]) == list(range(1, 64))
    assert all(list(each) == [0] for each in links[1:])
    for each in links:
        close(each)


@pytest.mark.parametrize(
    "words",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xfe\n",
        b"1\n",
        b"[]\n",
        b'{"process": 1}\n',
        b"[" * 9999 + b"\n",
    ],
)
def test_a_stranger_at_the_meeting(words: bytes, free_port) -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        hub = threads.submit(meet, f"localhost:{port}", 2, 0, start_s=30)
        with connect(port) as stranger:
            stranger.sendall(words)
        begin = time.monotonic()
        ours = meet(f"localhost:{port}", 2, 1, start_s=30)
        assert time.monotonic() - begin < 3, "the stranger is not waited for"
        close(hub.result() | ours)


def test_process_0_that_is_started_again_during_the_meeting(free_port) -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as threads, socket.create_server(("", port), reuse_port=True) as first:
        process = threads.submit(meet, f"localhost:{port}", 2, 1, start_s=30)
        first.accept()[0].close()
        first.close()
        begin, computed = time.monotonic(), time.process_time()
        hub = meet(f"localhost:{port}", 2, 0, start_s=30)
        close(hub | process.result())
        assert time.monotonic() - begin < 5 and time.process_time() - computed < 2


def test_a_process_of_more_processes_is_refused(free_port) -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        hub = threads.submit(meet, f"localhost:{port}", 2, 0, start_s=30)
        for run in (lambda: meet(f"localhost:{port}", 4, 3, start_s=30), hub.result):
            with pytest.raises(Refused, match="its NUM_PROCESSES is 4, and that of process 0 is 2"):
                run()


def test_a_port_on_which_another_run_listens(free_port, monkeypatch) -> None:
    """Also if it shares the port, as jax's service does."""
    monkeypatch.setattr(channel, "_FREE_S", 0.1)
    port = free_port()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("", port))
        other.listen()
        with pytest.raises(UserError, match=f"port {port} is in use on this host"):
            meet(f"localhost:{port}", 2, 0, start_s=30)


def test_messages_to_a_process_that_does_not_read_arrive_whole(pair) -> None:
    ours, theirs = pair
    ours.connection.setblocking(False)
    for step in range(50_000):
        ours.send(place=[step, "step"])
    ours.send(cause=[0, "a", 2, "x" * 100_000, ""])
    found = []

    def read() -> None:
        while not any("cause" in message for message in found):
            found.extend(theirs.receive() or [])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    limit = time.monotonic() + 20
    while reader.is_alive() and time.monotonic() < limit:
        ours.send(place=[60_000, "step"])
        time.sleep(0.001)
    steps = [message["place"][0] for message in found if "place" in message]
    assert steps == sorted(steps) and steps[0] == 0 and len(steps) < 50_000
    (cause,) = (message["cause"] for message in found if "cause" in message)
    assert len(cause[3]) == 100_000


@pytest.mark.parametrize(
    "address", ["node1", "8482", ":8482", "node1:", "node1:http", "node1:0", "node1:70000"]
)
def test_an_address_without_a_port(address: str, monkeypatch) -> None:
    for name, value in {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"COORDINATOR_ADDRESS is '{address}'; it must be host:port"):
        find_rank()
