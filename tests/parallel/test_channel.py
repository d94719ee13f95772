"""What connections stand. Threads play the processes."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from crosslmm_jax.parallel.channel import Link


@pytest.fixture
def pair() -> Iterator[tuple[Link, Link]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Link(0, "a", ours), Link(1, "b", theirs)


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
