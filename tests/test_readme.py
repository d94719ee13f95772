"""README against the code: commands parse, paths exist, the glossary is the model's, the Python runs."""

import ast
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import crosslmm_jax.model
from crosslmm_jax.cli.app import build_parser, main
from crosslmm_jax.config_io import load_experiment
from crosslmm_jax.presets import get_preset

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Each `crosslmm` command in README's shell blocks as words, without the program's name."""
    found = []
    for line in "".join(blocks("bash")).splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if Path(word).name == "crosslmm":
                rest = words[i + 1 :]
                found.append(rest[: rest.index("&&")] if "&&" in rest else rest)
    return found


def table_after(text: str, heading: str) -> list[tuple[str, ...]]:
    """Rows of the first markdown table in `text` whose heading row is `heading`."""
    lines = text[text.index(heading) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
    return rows


def test_length() -> None:
    assert len(README.splitlines()) <= 120


def test_glossary_is_the_models() -> None:
    heading = "| letter | meaning |"
    glossary = table_after(README, heading)
    assert len(glossary) == 14
    assert glossary == table_after(crosslmm_jax.model.__doc__ or "", heading)


def test_every_command_is_shown() -> None:
    assert {words[0] for words in commands()} == {
        "demo", "params", "data", "train", "ask", "chat", "convert", "profile",
    }  # fmt: skip


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    args = build_parser().parse_args(words)
    if words[0] == "train":
        load_experiment(ROOT / args.config, args.overrides)
    if words[0] == "params":
        get_preset(args.preset)


def test_the_test_command_is_marked_for_ci() -> None:
    """`.ci/run` reads it from between the marks."""
    marked = re.findall(r"^<!-- tests -->\n```bash\n(.*?)\n```\n<!-- /tests -->$", README, re.MULTILINE)
    assert len(marked) == 1
    # All tests: nothing behind says which.
    assert "'.[test]'" in marked[0] and marked[0].endswith(" .venv/bin/pytest -n 2 --dist loadfile")
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def symbols() -> list[tuple[str, str]]:
    return re.findall(r"`([\w./]+\.py):(\w+)`", README)


def test_symbols_are_listed() -> None:
    assert len(symbols()) >= 10


@pytest.mark.parametrize(("path", "symbol"), symbols())
def test_symbols_exist(path: str, symbol: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert symbol in defined


def test_rooms_are_those_of_the_package() -> None:
    """Every room in README exists, and every room that exists is in README."""
    rows = table_after(README, "| room | holds |")
    named = {name for row in rows for name in re.findall(r"`([\w.]+)", row[0])}
    package = ROOT / "crosslmm_jax"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    files = {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    assert named == rooms | files


def test_files_named_in_the_text_exist() -> None:
    for path in re.findall(r"`((?:configs|tests|\.ci|crosslmm_jax)/[\w./]*)[`:]", README):
        assert (ROOT / path).exists(), path


# What README shows, done --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what README's examples name: a MODEL in `runs/demo` and a video `clip.mp4`."""
    from crosslmm_jax.data.index.build import build_index
    from crosslmm_jax.demo.synthetic import write_dataset
    from crosslmm_jax.demo.tokenizer import write_default_tokenizer
    from crosslmm_jax.train.loop import train

    folder = tmp_path_factory.mktemp("readme")
    written = write_dataset(folder / "data", num_train=4, num_heldout=4, seed=0)
    write_default_tokenizer(folder / "tokenizer")
    build_index(str(written.train), folder / "index", tokenizer=str(folder / "tokenizer"), quiet=True)
    overrides = {
        "--data.index": folder / "index", "--data.tokenizer": folder / "tokenizer",
        "--data.batch-size": 8, "--stage.steps": 1,
        "--run.out": folder / "train", "--run.init-from": None,
    }  # fmt: skip
    words = [str(word) for pair in overrides.items() for word in pair]
    train(load_experiment(ROOT / "configs" / "tiny_stage2.py", words))
    shutil.copytree(folder / "train" / "model", folder / "runs" / "demo")
    shutil.copy(written.heldout_videos[0], folder / "clip.mp4")
    return folder


def test_the_python_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    (snippet,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert capsys.readouterr().out.count("\n") >= 1
    assert {"model", "video"} <= set(names)


def test_the_questions_are_answered(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    (words,) = (words for words in commands() if words[0] == "ask")
    assert main(words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["question"] == "What is the man doing?"
    assert isinstance(answer["answer"], str)
    assert main([*words, "--attention", "out.png"]) == 0
    assert (workplace / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_chat_answers_until_the_end_of_input(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.stdin", io.StringIO("Which shape is red?\nAnd blue?\n"))
    (words,) = (words for words in commands() if words[0] == "chat")
    assert main(words) == 0
    assert capsys.readouterr().out.strip()
