"""`python -m perf`: its list, its mistakes, the commands of docs/results, and that no wheel holds it."""

import fnmatch
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from crosslmm_jax.cli import app
from crosslmm_jax.cli.profile import TASKS
from crosslmm_jax.profiling import Request, suite
from perf import hour
from perf.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_the_list_has_a_line_per_command() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "perf", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\S", listed, re.MULTILINE)
        assert importlib.util.find_spec(f"perf.{name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0 and f"usage: python -m perf {name}" in capsys.readouterr().out


MISTAKES = [
    (["fly"], "'fly' is unknown; choose one of peers, ask, attention"),
    (["attention", "--fly"], "unrecognized arguments: --fly; see `python -m perf attention --help`"),
    (["scaling", "--preset", "tiny", "--devices", "0"], "--devices 0: give numbers of at least 1"),
    (["attention", "--preset", "tiny", "--kv-splits", "0"], "--kv-splits 0: give numbers of at least 1"),
    (["scaling", "--preset", "3b"], "--preset '3b' is unknown"),
    (["attention", "--frames", "2"], "nothing to measure; give --preset crosslmm_2b"),
    (
        ["peers", "prefill", "--preset", "tiny", "--peer", "siglip"],
        "--peer 'siglip' is no peer for prefill; choose one of llava-onevision-7b, llava-onevision-0",
    ),
    (["peers", "decode", "--preset", "tiny", "--peer", "siglip"], "invalid choice: 'decode'"),
    (["peers", "encoder", "--preset", "tiny", "--v2v-scope", "frame"], "give it with prefill"),
    (["precision", "--preset", "tiny", "--videos", "x", "--figure", "x.png"], "--figure with precision"),
    (["ask", "--preset", "tiny"], "invalid choice: 'tiny'"),
    (["ask", "--tiny", "--max-new-tokens", "0"], "--max-new-tokens 0: give a number of at least 1"),
    (["hour", "--clips", ".", "--work", "w", "--cases", "12x"], "--cases 12x: write frames, then k"),
    (["hour", "--clips", "none", "--work", "w"], "--clips none: holds no .mp4 file"),
    (["needle"], "the following arguments are required: --model"),
    (["precision", "--preset", "tiny"], "the following arguments are required: --videos"),
    (["attention", "--preset", "tiny", "--videos", "x"], "unrecognized arguments: --videos x"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_mistakes_end_in_one_line(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "_measure", lambda *_: pytest.fail("measured"))
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("torch", ["peers", "encoder", "--peer", "siglip"]), ("cv2", ["decode_speed"]),
        ("decord", ["decode_speed"]),
    ],
)  # fmt: skip
def test_a_missing_package_is_named(
    package: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec_of = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else spec_of("json")
    )
    assert main(words) == 2
    assert capfd.readouterr().err == (
        f"perf: error: {package} is not installed: pip install -e '.[benchmark]'\n"
    )


def test_the_commands_that_are_written_down_are_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of docs/results/README.md, as a shell hands it over, up to the processes it would start."""
    page = (Path(__file__).parents[2] / "docs" / "results" / "README.md").read_text()
    asked: list[Request] = []
    monkeypatch.chdir(tmp_path)
    for folder in ("r", "$R"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(
        suite, "_measure",
        lambda request, _: asked.append(request) or {"request": {}, "facts": {}, "rows": [], "errors": []},
    )  # fmt: skip
    measured_here = {"decode_speed": [], "index_scale": [], "input_throughput": [], "needle": [], "plans": []}
    monkeypatch.setattr(hour, "write_hour", lambda *_, **__: None)
    for name, words_seen in measured_here.items():
        module = importlib.import_module(f"perf.{name}")
        monkeypatch.setattr(module, "main", words_seen.extend)
    programs = {"crosslmm profile ": app.main, "python -m perf ": main}
    reports = 0
    for line in page.splitlines():
        for program, run in programs.items():
            if line.startswith(program):
                line = re.sub(r"\$\(out ([^)]*)\)", r"--json r/\1.json --markdown r/\1.md", line)
                words = shlex.split(line.removeprefix("crosslmm ").removeprefix("python -m perf "))
                if words[0] == "report":
                    words[1] = str(ROOT / "docs" / "results" / Path(words[1]).name.replace("${G}", "h200"))
                    reports += 1
                assert run(words) == 0, line
    assert all(measured_here.values())
    assert reports and {request.task for request in asked} == {
        *(f"crosslmm_jax.profiling.tasks.{task}" for task in TASKS),
        *(f"perf.{name}" for name in ("peers", "attention", "long_video", "scaling", "precision", "hour")),
        *(f"perf.ask.{name}" for name in ("folder", "many", "inputs", "peer")),
        "crosslmm_jax.profiling.tasks.ask",
    }


def packages_of_the_wheel() -> set[str]:
    """As setuptools finds them: folders with an `__init__.py` whose name `include` matches."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    inits = [*ROOT.glob("*/__init__.py"), *ROOT.glob("crosslmm_jax/**/__init__.py")]
    names = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert set(settings) == {"include"}
    return {name for name in names if any(fnmatch.fnmatch(name, like) for like in settings["include"])}


def test_the_wheel_holds_no_peer_no_kernel_sweep_and_no_goal() -> None:
    packages = packages_of_the_wheel()
    assert "crosslmm_jax.profiling" in packages and not any(name.startswith("perf") for name in packages)
    for package in packages:
        for path in (ROOT / package.replace(".", "/")).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(
                r"meets_(bar|goal)|\bBARS\b|llava-onevision-7b|LlavaOnevisionForConditionalGen", text
            ), path
