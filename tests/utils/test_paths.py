"""Which paths name an object store, by one rule for settings and commands."""

from pathlib import Path

import pytest

from crosslmm_jax.config import is_remote
from crosslmm_jax.errors import UserError
from crosslmm_jax.utils import check_local, guess_meant


@pytest.mark.parametrize(
    "path",
    [
        "gs://b/x",
        "S3://b/x",
        "gs:/b/x",
        "https://a.b/x",
        "runs/gs://b/x",
        Path("gs://b/x"),
        Path("/w/gs:") / "b",
    ],
)
def test_remote(path: str | Path) -> None:
    """Also as `Path` writes it, which drops a slash; below another folder only while both are there."""
    assert is_remote(path) == (path != Path("/w/gs:/b"))


@pytest.mark.parametrize("path", ["runs/a", "/a/b", "A: movie.mp4", "a:b/c", "C:/x", "runs/a:/b", ""])
def test_local(path: str) -> None:
    assert not is_remote(path)
    check_local(path)


@pytest.mark.parametrize("path", ["gs://b/x", "gs:/b/x", Path("gs://b/x")])
def test_the_message_has_what_the_user_wrote(path: str | Path) -> None:
    with pytest.raises(UserError, match="^gs://b/x: object stores are not supported yet"):
        check_local(path)
    assert guess_meant(path) == "; only files of a mounted disk are read: copy it to one"
