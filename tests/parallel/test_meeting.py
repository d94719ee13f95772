"""The meeting of processes, and who is refused there. Threads play the processes."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from crosslmm_jax.errors import ConfigError, UserError
from crosslmm_jax.parallel import meeting
from crosslmm_jax.parallel.channel import Link
from crosslmm_jax.parallel.meeting import Refused, meet
from crosslmm_jax.parallel.rank import find_rank

SOFTWARE = {"versions": {"python": "3"}, "files": {"a.py": "1"}}


@pytest.fixture(autouse=True)
def same_software(monkeypatch) -> None:
    monkeypatch.setattr(meeting, "software", lambda: SOFTWARE)


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


@pytest.fixture
def quick_refusals(monkeypatch) -> None:
    monkeypatch.setattr(meeting, "_QUIET_S", 3.0)


def refused(*places: tuple[int, int], port: int) -> str:
    """Starts processes of (NUM_PROCESSES, PROCESS_ID), of which one is missing; why all of them end."""
    begin = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        runs = []
        for count, index in places:
            runs.append(threads.submit(meet, f"localhost:{port}", count, index, start_s=60))
            time.sleep(0.3)
        said = {str(run.exception(30).args[0]) for run in runs if isinstance(run.exception(30), Refused)}
    assert len(said) == 1 and time.monotonic() - begin < 20
    return said.pop()


@pytest.mark.parametrize("places", [((4, 0), (2, 1), (4, 2)), ((2, 0), (4, 1), (4, 2)), ((4, 2), (2, 0))])
def test_another_number_of_processes_ends_all_that_are_there(places, free_port, quick_refusals) -> None:
    said = refused(*places, port=free_port())
    ours, theirs = (2, 4) if (2, 0) in places else (4, 2)
    assert f"its NUM_PROCESSES is {theirs}, and that of process 0 is {ours}; give all hosts the same" in said


@pytest.mark.parametrize(
    "places", [((3, 0), (3, 1), (3, 1)), ((3, 2), (3, 2), (3, 0)), ((3, 0), (3, 0), (3, 1))]
)
def test_a_place_that_two_processes_have_ends_all_that_are_there(places, free_port, quick_refusals) -> None:
    index = max(index for _, index in places if places.count((3, index)) == 2)
    host = socket.gethostname()
    assert refused(*places, port=free_port()) == (
        f"process {index} on host {host}: PROCESS_ID is {index} here, and for another process on host {host};"
        " give each of the 3 processes its own, 0 to 2"
    )


def test_process_0_on_two_hosts(free_port, quick_refusals, monkeypatch) -> None:
    """The one whose host the address does not name finds the other one there."""
    ports = [free_port(), free_port()]
    listen, elsewhere = meeting._listen, list(ports)
    monkeypatch.setattr(meeting, "_listen", lambda port, hello: listen(elsewhere.pop(), hello))
    assert "PROCESS_ID is 0 here, and for another" in refused((3, 0), (3, 0), port=ports[0])


def test_a_process_that_is_started_again_during_the_meeting(free_port) -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        hub = threads.submit(meet, f"localhost:{port}", 3, 0, start_s=30)
        with connect(port) as killed:
            killed.sendall(json.dumps(meeting._hello(1, 3)).encode() + b"\n")
            time.sleep(0.5)
        other = threads.submit(meet, f"localhost:{port}", 3, 1, start_s=30)
        last = meet(f"localhost:{port}", 3, 2, start_s=30)
        close(hub.result())
        close(other.result() | last)


@pytest.mark.parametrize("process", [0, 1])
def test_a_run_that_has_started_without_this_process(process: int, free_port, monkeypatch) -> None:
    """jax's service answers in its place, and closes the connection."""
    monkeypatch.setattr(meeting, "_OCCUPIED_S", 1.0)
    settings = b"\0\0\x18\4\0\0\0\0\0\0\4\0@\0\0"  # of HTTP/2
    port = free_port()
    if process == 0:  # on another host than this service
        listen, elsewhere = meeting._listen, free_port()
        monkeypatch.setattr(meeting, "_listen", lambda port, hello: listen(elsewhere, hello))

    def answer(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as connection:
                    connection.recv(1 << 10)
                    connection.sendall(settings)

    with socket.create_server(("", port), reuse_port=True) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        expected = rf"a run has started there without this process, whose PROCESS_ID is {process} and whose"
        with pytest.raises((UserError, Refused), match=expected):
            meet(f"localhost:{port}", 2, process, start_s=30)


def test_a_port_on_which_another_run_listens(free_port, monkeypatch) -> None:
    """Also if it shares the port, as jax's service does."""
    monkeypatch.setattr(meeting, "_FREE_S", 0.1)
    port = free_port()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("", port))
        other.listen()
        with pytest.raises(UserError, match=f"port {port} is in use on this host"):
            meet(f"localhost:{port}", 2, 0, start_s=30)


@pytest.mark.parametrize(
    "address", ["node1", "8482", ":8482", "node1:", "node1:http", "node1:0", "node1:70000"]
)
def test_an_address_without_a_port(address: str, monkeypatch) -> None:
    for name, value in {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "PROCESS_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"COORDINATOR_ADDRESS is '{address}'; it must be host:port"):
        find_rank()
