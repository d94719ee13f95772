"""A folder or file that is written is complete or absent, whatever happens meanwhile."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import atomic_folder, atomic_write, is_vacant

either = pytest.mark.parametrize("resume", [False, True])


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder that is to be replaced."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("older")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@either
def test_two_writers_of_one_folder(older: Path, tmp_path: Path, resume: bool) -> None:
    """The second is refused and leaves the first one's work alone."""
    refused = pytest.raises(UserError, match="folder: another process is writing it; wait for it")
    with atomic_folder(older, resume=resume) as first:
        (first / "file").write_text("first")
        with refused, atomic_folder(older, resume=resume):
            raise AssertionError("the block of the second was entered")
        with atomic_folder(tmp_path / "another", resume=resume):
            pass
        assert contents(older) == {"file": "older"}
    assert contents(older) == {"file": "first"}
    with atomic_folder(older, resume=resume):
        pass
    assert names(tmp_path) == ["another", "folder"], "no lock remains"


@either
def test_a_killed_writer_blocks_nobody(older: Path, tmp_path: Path, resume: bool) -> None:
    (tmp_path / ".folder.lock").touch()
    (tmp_path / ".folder.building").mkdir()
    (tmp_path / ".folder.building" / "half").touch()
    (tmp_path / ".folder.old").mkdir()
    with atomic_folder(older, resume=resume) as building:
        assert names(building) == (["half"] if resume else [])
    assert names(tmp_path) == ["folder"]


def test_a_lock_of_an_earlier_version_is_not_published(older: Path, tmp_path: Path) -> None:
    (tmp_path / ".folder.building").mkdir()
    (tmp_path / ".folder.building" / "lock").touch()
    with atomic_folder(older, resume=True) as building:
        (building / "file").write_text("newer")
    assert contents(older) == {"file": "newer"}


@pytest.mark.parametrize(
    ("code", "fix"),
    [(errno.ENOLCK, "name another"), (errno.EACCES, "name another"), (errno.ENOSPC, "free space there or")],
)
def test_only_a_full_disk_needs_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fix: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    refused = pytest.raises(UserError, match=rf"cannot be written \({os.strerror(code)}\); {fix}")
    with refused, atomic_folder(tmp_path / "folder", resume=True):
        raise AssertionError("the block was entered")


@either
def test_an_error_keeps_the_older_folder(older: Path, tmp_path: Path, resume: bool) -> None:
    """What was written meanwhile is kept to go on with, or deleted."""
    with pytest.raises(ValueError, match="stop"), atomic_folder(older, resume=resume) as building:
        (building / "half").touch()
        raise ValueError("stop")
    assert contents(older) == {"file": "older"}
    assert names(tmp_path) == ([".folder.building"] if resume else []) + ["folder"]
    with atomic_folder(older, resume=resume):
        pass
    assert names(older) == (["half"] if resume else [])


@either
def test_the_older_folder_comes_back_when_the_new_one_cannot_take_its_place(
    older: Path, tmp_path: Path, resume: bool
) -> None:
    """The message says why, how to fix it, and only where it is true that the command goes on."""
    fix = r"folder: cannot be written \(No such file or directory\); name another folder"
    fix += "; the same command resumes$" if resume else "$"
    with pytest.raises(UserError, match=fix), atomic_folder(older, resume=resume) as building:
        shutil.rmtree(building)
    assert contents(older) == {"file": "older"} and names(tmp_path) == ["folder"]


@either
def test_a_target_that_cannot_be_written(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(
        UserError, match=r"file/folder: cannot be written \((File exists|Not a directory)\)"
    )
    with refused, atomic_folder(tmp_path / "file" / "folder", resume=resume):
        raise AssertionError("the block was entered")


def test_a_mounted_disk_is_not_replaced(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == older)
    refused = pytest.raises(UserError, match="folder: a disk is mounted there; name a folder inside it")
    with refused, atomic_folder(older, resume=False):
        raise AssertionError("the block was entered")


@either
def test_a_link_stays_a_link(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "link", resume=resume) as building:
            (building / "file").write_text(text)
        assert contents(tmp_path / "disk" / "folder") == {"file": text}
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["disk", "link"]


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "file", b"older")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        atomic_write(tmp_path / "file", b"newer")
    assert contents(tmp_path) == {"file": "older"}
    atomic_write(tmp_path / "file", b"newer")
    assert contents(tmp_path) == {"file": "newer"}


def test_vacant(older: Path, tmp_path: Path) -> None:
    assert is_vacant(tmp_path / "absent") and not is_vacant(older) and not is_vacant(older / "file")
    (older / "file").unlink()
    assert is_vacant(older)


@pytest.mark.parametrize("name", ["gs://bucket/run", "s3://bucket/run", "gs:/bucket/run"])
def test_an_object_store_is_refused_before_anything_is_written(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="object stores are not supported yet; name a folder"):
        with atomic_folder(name, resume=False):
            pass
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "A: film", resume=False) as folder:
        (folder / "x").touch()
    assert (tmp_path / "A: film" / "x").exists()
