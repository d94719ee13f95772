"""A run folder has one owner: who is refused, who takes over, and when."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crosslmm_jax.errors import UserError
from crosslmm_jax.train.guards import owner as module
from crosslmm_jax.train.guards.owner import OWNER_FILE, RunOwner, this_process

# Owns a folder until it is killed. Not by the package, which imports jax.
OWNS = """
    import runpy, sys
    from pathlib import Path
    owner = runpy.run_path(sys.argv[1])["RunOwner"](Path(sys.argv[2]))
    owner.claim()
    print("owns", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process(tmp_path) -> Iterator[subprocess.Popen]:
    """A process that owns `tmp_path`."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs Linux's /proc")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNS), module.__file__, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stdout.readline() == "owns\n"
        yield process
        process.kill()


@pytest.fixture
def put_owner(tmp_path) -> Callable[..., Path]:
    """`put_owner(age, **fields)`: an owner file with fields of a process, and a heartbeat of some age."""

    def put(age: float, **fields: object) -> Path:
        path = tmp_path / OWNER_FILE
        path.write_text(json.dumps({"token": "abc", **vars(this_process()), **fields}))
        os.utime(path, (time.time() - age,) * 2)
        return path

    return put


def claim(folder: Path) -> None:
    """Claims and releases."""
    owner = RunOwner(folder)
    try:
        owner.claim()
        owner.check()
    finally:
        owner.release()
    assert list(folder.iterdir()) == []


def test_one_after_the_other(tmp_path) -> None:
    claim(tmp_path)
    claim(tmp_path)


def test_a_second_run_is_told_of_the_first(tmp_path, other_process) -> None:
    first = re.escape(f"process {other_process.pid} on host {socket.gethostname()}")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^run\.out {tmp_path}: {first} is training in this folder"):
            claim(tmp_path)
    assert json.loads((tmp_path / OWNER_FILE).read_text())["pid"] == other_process.pid


def test_a_run_that_was_killed_is_taken_over_at_once(tmp_path, other_process, caplog) -> None:
    other_process.kill()
    os.waitid(os.P_PID, other_process.pid, os.WEXITED | os.WNOWAIT)  # dead, but its number is not free
    begin = time.monotonic()
    claim(tmp_path)
    assert time.monotonic() - begin < 1 and caplog.messages == []


def test_another_process_with_the_number_of_the_dead_one(tmp_path, put_owner) -> None:
    put_owner(0, started=this_process().started - 1)
    claim(tmp_path)


def test_another_host_is_waited_for(tmp_path, put_owner, monkeypatch, caplog) -> None:
    monkeypatch.setattr(module, "STALE_S", 1.5)
    put_owner(0.5, machine="elsewhere", host="node7", pid=12)
    begin = time.monotonic()
    claim(tmp_path)
    assert 0.5 < time.monotonic() - begin < 5
    said = r"process 12 on host node7 trained here \d s ago; waiting up to \d s for a sign of its life"
    assert re.fullmatch(rf"run\.out {tmp_path}: {said}", *caplog.messages)


def test_another_host_whose_heartbeat_is_old(tmp_path, put_owner, caplog) -> None:
    put_owner(31, machine="elsewhere")
    claim(tmp_path)
    put_owner(31).write_text('{"token": "ab')  # killed while it wrote
    os.utime(tmp_path / OWNER_FILE, (time.time() - 31,) * 2)
    claim(tmp_path)
    assert caplog.messages == []


def test_another_host_that_lives(tmp_path, put_owner) -> None:
    path, ended = put_owner(20, machine="elsewhere", host="node7", pid=12), threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    with ThreadPoolExecutor(1) as beside:
        beside.submit(beat)
        try:
            with pytest.raises(UserError, match="process 12 on host node7 is training in this folder"):
                claim(tmp_path)
        finally:
            ended.set()


def test_an_owner_whose_folder_was_taken_over(tmp_path, put_owner) -> None:
    owner = RunOwner(tmp_path)
    owner.claim()
    try:
        put_owner(0, machine="elsewhere", host="node7", pid=12)
        with pytest.raises(UserError, match="process 12 on host node7 has taken this folder over"):
            owner.check()
    finally:
        owner.release()
    assert (tmp_path / OWNER_FILE).exists(), "the other's file stays"


def test_heartbeats_go_on(tmp_path, monkeypatch) -> None:
    """Also after somebody has deleted the file by hand."""
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    owner, path = RunOwner(tmp_path), tmp_path / OWNER_FILE
    owner.claim()
    try:
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0)
        path.unlink()
        wait_until(path.exists)
        owner.check()
    finally:
        owner.release()
    assert list(tmp_path.iterdir()) == []


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_one_of_many_takes_over(tmp_path, put_owner, monkeypatch, links: bool) -> None:
    if not links:

        def link(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        monkeypatch.setattr(module, "STALE_S", 0.5)  # of a file that is found half-written

    def attempt(owner: RunOwner) -> bool:
        try:
            owner.claim()
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            put_owner(60, started=0)
            owners = [RunOwner(tmp_path) for _ in range(8)]
            won = [owner for owner, wins in zip(owners, pool.map(attempt, owners), strict=True) if wins]
            assert len(won) == 1
            won[0].check()
            won[0].release()
            assert list(tmp_path.iterdir()) == []


def test_a_removal_that_was_cut_short(tmp_path, put_owner) -> None:
    put_owner(60, started=0)
    removing = tmp_path / f".{OWNER_FILE}.removing"
    removing.mkdir()
    os.utime(removing, (time.time() - 31,) * 2)
    claim(tmp_path)


def test_a_full_disk(mount_disk, fill) -> None:
    disk = mount_disk(kilobytes=64)
    fill(disk)
    with pytest.raises(UserError, match=rf"run\.out {disk}: No space left on device; free space there"):
        RunOwner(disk).claim()


def test_a_folder_that_is_not_shared_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SHARED_S", 0.1)
    first, other = RunOwner(tmp_path), RunOwner(tmp_path)
    first.claim()
    other.check_shared(first.claimed_by)
    with pytest.raises(
        UserError, match="does not see what process 0 writes there; name a folder that all hosts"
    ):
        RunOwner(tmp_path / "elsewhere").check_shared(first.claimed_by)
    first.release()
