"""The `crosslmm` command: answers at once, calls the right room, and reports a mistake in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import crosslmm_jax
from crosslmm_jax.cli.app import build_parser, main
from crosslmm_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "crosslmm_jax.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_answers_in_under_a_second() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run("--help")
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0
        assert all(f"    {name} " in result.stdout for name in ("demo", "params", "train", "ask", "chat"))
    assert min(seconds) < 1, f"{seconds} s; a busy machine may slow one run, not each of three"


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["ask", "--help"], ["--version"], []])
def test_parsing_imports_nothing_heavy(words: list[str]) -> None:
    program = f"""
import sys
from crosslmm_jax.cli.app import main
try:
    main({words!r})
except SystemExit:
    pass
heavy = {{"jax", "numpy", "flax", "grain", "av", "tyro", "transformers", "rich"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"crosslmm_jax {crosslmm_jax.__version__}\n"


MISTAKES = [
    ([], "required: COMMAND; see `crosslmm --help`"),
    (["fly"], "invalid choice: 'fly'"),
    (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x'; see `crosslmm demo --help`"),
    (["demo", "--fast"], "unrecognized arguments: --fast"),
    (["params"], "the following arguments are required: --preset"),
    (["params", "--preset", "3b"], "--preset '3b' is unknown; choose one of tiny"),
    (["params", "--preset", "tiny", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: No"),
    (["train"], "the following arguments are required: CONFIG.py"),
    (["train", "configs/nope.py"], "configs/nope.py: no such config file"),
    (["train", "configs/tiny_stage1.py", "--stage.stepz", "1"], "unknown override --stage.stepz; did you"),
    (["train", "configs/tiny_stage1.py", "--stage.steps", "many"], "--stage.steps takes an integer"),
    (["train", "configs/tiny_stage1.py", "--stage.steps", "0"], "StageConfig.steps is 0; it must be greater"),
    (["ask", "m", "v.mp4"], "give VIDEO and QUESTION, or --questions and --out"),
    (["ask", "m", "v.mp4", ""], "the question is empty"),
    (["ask", "m", "v.mp4", "  \n"], "the question is empty"),
    (["ask", "no_model", "v.mp4", "What?"], "no_model"),
    (["chat", "no_model", "v.mp4"], "no_model"),
    (["data", "check", "index", "--deadline-s", "0"], "DataConfig.deadline_s is 0.0; it must be a finite"),
    (["data", "stats", "index", "--frames", "8"], "--frames 8 is now written --sampling.frames 8"),
    (["data", "stats", "index", "--style", "prose"], "'prose' for argument '--style'"),
    (["data", "stats", "index", "--sampling.frames", "0"], "data stats: SamplingConfig.frames is 0; it must"),
    (["train", "configs/tiny_stage1.py", "--run.out", "gs://b/x"], "must be a folder of a mounted disk"),
    (["data", "index", "m.yaml", "--out", "gs://b/x"], "gs://b/x: object stores are not supported yet"),
    (["data", "to-tfds", "m.yaml", "--out", "s3://b/x"], "s3://b/x: object stores are not supported yet"),
    (["ask", "gs://b/x", "v.mp4", "What?"], "error: gs://b/x: object stores are not supported yet"),
    (["export", "gs://b/x"], "error: gs://b/x: object stores are not supported yet"),
    (["convert", "to-hf", "gs://b/x", "--out", "m"], "error: gs://b/x: object stores are not supported yet"),
    (["data", "merge", "gs://b/x"], "error: gs://b/x: object stores are not supported yet"),
    (["demo", "--out", "gs://b/x"], "error: gs://b/x: object stores are not supported yet"),
    (
        ["train", "configs/tiny_stage1.py", "--data.seed", "-1"],
        "DataConfig.seed is -1; it must be within",
    ),
    (
        ["ask", "m", "v.mp4", "What?", "--seed", "-1"],
        "argument --seed: '-1' is not a whole number",
    ),
    (["ask", "m", "v.mp4", "What?", "--json", "s3://b/x"], "s3://b/x: object stores are not supported yet"),
    (["data", "check", "index", "--sample", "-1"], "argument --sample: '-1' is not a whole number of 0"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    out, err = capfd.readouterr()
    assert err.startswith("crosslmm: error: ")
    assert message in err
    assert err.count("\n") == 1 and err.endswith("\n")
    assert out == "" or words[0] == "params", "nothing else is said"


def test_exit_code_of_the_process() -> None:
    result = run("train", "configs/nope.py")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("crosslmm: error: configs/nope.py: no such config file")


def fail(error: BaseException) -> Any:
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


def put_demo(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    """Replaces the room `demo` by one whose `run` is `call`."""
    monkeypatch.setitem(sys.modules, "crosslmm_jax.demo", SimpleNamespace(run=call))


def test_messages_of_several_lines_are_joined(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_demo(monkeypatch, fail(UserError("a.json: field x\n   is bad; fix it\n")))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "crosslmm: error: a.json: field x is bad; fix it\n"


@pytest.mark.parametrize("words", [["demo", "--debug"], ["--debug", "demo"]])
def test_debug_shows_the_traceback(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_demo(monkeypatch, fail(UserError("bad")))
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("crosslmm: error: bad\n")


@pytest.mark.parametrize("closed", [False, True], ids=["full disk", "closed pipe"])
def test_an_ending_that_nobody_hears_is_no_failure(closed: bool) -> None:
    reader, pipe = os.pipe()
    os.close(reader)
    program = "from crosslmm_jax.cli.options import say; say('written')"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, stdout=pipe if closed else full, stderr=subprocess.PIPE
        )
    os.close(pipe)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("lines", [1, 10_000], ids=["buffered", "longer than the buffer"])
def test_a_pipe_that_is_closed_early_gets_no_traceback(lines: int) -> None:
    reader, pipe = os.pipe()
    os.close(reader)
    program = (
        "import sys, types; from crosslmm_jax.cli import app\n"
        f"args = types.SimpleNamespace(command='data', run=lambda args: print('row\\n' * {lines}))\n"
        "app.build_parser = lambda: types.SimpleNamespace(parse_args=lambda words: args)\n"
        "sys.exit(app.main([]))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    assert (result.returncode, result.stderr) == (141, b"")


def test_debug_reaches_train_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nope.py", "--debug"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    put_demo(monkeypatch, fail(ZeroDivisionError("not the user's")))
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


@pytest.mark.parametrize(("words", "said"), [((), ""), (("step 3 is saved",), "crosslmm: step 3 is saved\n")])
def test_ctrl_c(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_demo(monkeypatch, fail(KeyboardInterrupt(*words)))
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == said


STUCK = """
import sys, threading, time, types
from concurrent.futures import ThreadPoolExecutor
from crosslmm_jax.cli import main

class Pool(ThreadPoolExecutor):
    def shutdown(self, *args, **kwargs):
        print("waits", flush=True)
        super().shutdown(*args, **kwargs)

def clean_up(out, **options):
    with Pool(1) as pool:
        pool.submit(time.sleep, 60)
        print("runs", flush=True)
        time.sleep(60)

def thread(out, **options):
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("runs", flush=True)
    time.sleep(60)

sys.modules["crosslmm_jax.demo"] = types.SimpleNamespace(run=globals()[sys.argv.pop()])
code = main()
print("waits", flush=True)
sys.exit(code)
"""


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("stuck", ["clean_up", "thread"])
def test_ctrl_c_twice_ends_at_once_without_a_traceback(stuck: str) -> None:
    words = [sys.executable, "-c", STUCK, "demo", stuck]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for said in ("runs\n", "waits\n"):
        assert process.stdout.readline() == said
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize(
    "words",
    [["params", "--preset", "tiny"], ["--help"], ["train", "configs/tiny_stage1.py", "--help"]],
    ids=" ".join,
)
def test_a_full_disk_behind_stdout_is_one_line(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "crosslmm_jax.cli", *words],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    said = "crosslmm: error: stdout: No space left on device; write the output to a disk with space\n"
    assert (result.returncode, result.stderr) == (2, said)


def test_words_that_are_not_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", "m", os.fsdecode(b"caf\xe9.mp4"), "What?"]) == 2
    err = capsys.readouterr().err
    assert "word 3 after crosslmm is b'caf\\xe9.mp4', which is not UTF-8; rename the file" in err


@pytest.mark.parametrize(
    ("platform", "said"),
    [("nowhere", "Unable to initialize backend 'nowhere'"), ("cuda", "jax has no support for it")],
)
def test_a_platform_that_is_not_there(
    platform: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """jax has started in this process, so its refusal is given as it raises it."""
    error = RuntimeError(f"{said}\nmore") if platform == "nowhere" else AssertionError()
    put_demo(monkeypatch, fail(error))
    monkeypatch.setenv("JAX_PLATFORMS", platform)
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(devices=fail(error)))
    assert main(["demo"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"crosslmm: error: JAX_PLATFORMS is '{platform}', which is not there ({said}")
    assert err.endswith("; unset it, or try cpu\n")
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(devices=list))  # it is there: another fault
    with pytest.raises(type(error)):
        main(["demo"])


@pytest.mark.slow
def test_jax_refuses_a_platform_as_the_message_expects() -> None:
    env = os.environ | {"JAX_PLATFORMS": "nowhere"}
    words = [sys.executable, "-m", "crosslmm_jax.cli", "params", "--preset", "tiny"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=env)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "JAX_PLATFORMS is 'nowhere', which is not there (Unable to initialize backend" in result.stderr
    env["JAX_PLATFORMS"] = "cpu"
    assert subprocess.run(words, cwd=ROOT, capture_output=True, env=env).returncode == 0


def test_demo_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    put_demo(monkeypatch, lambda out, **options: calls.append((out, options)))
    assert main(["demo"]) == main(["demo", "--out", "x", "--seed", "3", "--quick"]) == 0
    assert calls == [("runs/demo", {"seed": 0, "quick": False}), ("x", {"seed": 3, "quick": True})]


def test_overrides_reach_the_config_in_order() -> None:
    words = ["train", "c.py", "--mesh.data", "-1", "--run.init-from", "None", "--data.text-buckets", "1", "2"]
    args = build_parser().parse_args(words)
    assert (args.config, args.overrides) == ("c.py", words[2:])


def test_train_help_lists_the_fields_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "configs" / "tiny_stage1.py"
    assert main(["train", str(path), "--help"]) == 0
    out = capsys.readouterr().out
    assert "--stage.learning-rate FLOAT" in out and "(default: 0.002)" in out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "crosslmm train CONFIG.py --help" in " ".join(capsys.readouterr().out.split())


def test_fields_of_a_command_are_spelled_as_after_train() -> None:
    words = [
        "--vision.remat",
        "none",
        "--cross-attention.directions",
        "v2v",
        "t2v",
        "--decoder.remat",
        "False",
    ]
    args = build_parser().parse_args(["convert", "from-hf", "--out", "m", *words, "--llm", "qwen"])
    assert (args.overrides, args.llm) == (words, "qwen")
    with pytest.raises(UserError, match=r"unrecognized arguments: --decoder\.max-positions"):
        build_parser().parse_args(["convert", "from-hf", "--out", "m", "--decoder.max-positions", "9"])
    args = build_parser().parse_args(["data", "stats", "--sampling.frames", "8", "index"])
    assert (args.overrides, args.index) == (["--sampling.frames", "8"], "index")


def test_ask_takes_options_on_any_side() -> None:
    front = build_parser().parse_args(["ask", "--frames", "8", "m", "v", "Why?", "--json", "-"])
    back = build_parser().parse_args(["ask", "m", "v", "Why?", "--json", "-", "--frames", "8"])
    assert vars(front) == vars(back)
    assert (front.model, front.video, front.question, front.frames, front.json) == ("m", "v", "Why?", 8, "-")


def test_params_prints_a_table_or_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["params", "--preset", "tiny"]) == 0
    assert "encoder" in capsys.readouterr().out
    assert main(["params", "--preset", "tiny", "--json", "-"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert set(counts) == {"parts", "trainable"}
    assert set(counts["parts"]) == {"encoder", "projector", "v2v", "t2v", "decoder", "embeddings"}
    assert counts["trainable"]["stage1"] == counts["parts"]["projector"] + counts["parts"]["v2v"]
    assert counts["trainable"]["stage2"] == sum(counts["parts"].values())
    path = tmp_path / "counts.json"
    assert main(["params", "--preset", "tiny", "--json", os.fspath(path)]) == 0
    assert json.loads(path.read_text()) == counts
