"""Progress without a terminal: plain lines now and then, or when there is something to report."""

import itertools

import pytest

from crosslmm_jax.utils import progress as progress_module
from crosslmm_jax.utils.progress import Progress


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is 4 seconds after the one before."""
    seconds = itertools.count(0, 4)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(seconds))


def test_reported_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("stage1", unit="steps", total=20, seconds_between_lines=None) as progress:
        for step in range(1, 10):
            progress.update(step)
        progress.report(10, "loss 0.2500  20 ms/step")
    assert capsys.readouterr().err == "stage1: 10/20 steps  loss 0.2500  20 ms/step\n"


@pytest.mark.parametrize(
    ("unit", "total", "line"),
    [
        ("rows", 50, "x: 30/50 rows  2 rows/s  3 bad"),
        ("rows", None, "x: 30 rows  2 rows/s  3 bad"),
        ("bytes", 5 * 10**10, "x: 30.00 of 50.00 GB  1667 MB/s  3 bad"),
    ],
)
def test_a_line_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], unit: str, total: int | None, line: str
) -> None:
    """Of a task that another process has begun: the rate is of this one."""
    scale = 10**9 if unit == "bytes" else 1
    with Progress("x", unit=unit, total=total, done=10 * scale) as progress:
        for done in (20, 25, 30, 35, 40):
            progress.update(done * scale, "3 bad")
    assert capsys.readouterr().err.splitlines() == [line]


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", unit="steps", total=20, quiet=True) as progress:
        for done in range(10):
            progress.update(done)
        progress.report(10, "loss 0.25")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("x", unit="steps", total=20) as progress:
        progress.update(5)
        progress.report(10, "loss 0.25")
    shown = capsys.readouterr().err
    assert "10/20" in shown and "loss 0.25" in shown
