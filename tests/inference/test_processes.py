"""Two processes answer together as one does: weights or videos divided between them, and one that fails."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.inference import Item, Sampling, VideoModel, answer_many, load, score_options
from crosslmm_jax.inference.replies import AnswerOptions
from crosslmm_jax.parallel import make_mesh

pytestmark = [pytest.mark.slow, pytest.mark.multihost]

OPTIONS = ("a circle", "red", "circle and square")


def answers(model, clips: list[str], missing: str) -> dict:
    """What a model says, as JSON. Answers need several calls of `generate`; one video is not there."""
    sampled = AnswerOptions(max_new_tokens=5, sampling=Sampling(1.5, 0.9), seed=3)
    greedy = AnswerOptions(max_new_tokens=20)
    items = [Item(clips[0], "What?", greedy), Item(clips[0], "Where is it?", sampled), Item(missing, "What?")]
    items += [Item(clip, "Which colour?", greedy) for clip in clips[1:]]
    video = model.watch(clips[0])
    chat = video.chat(max_new_tokens=3)
    return {
        "ask": video.ask("What shape is the red object?", max_new_tokens=20),
        "chat": ["".join(chat.ask(question)) for question in ("What?", "And now?")],
        "many": [getattr(answer, "text", "no such file") for answer in answer_many(model, items)],
        "scores": score_options(video, "Which?", OPTIONS).tolist(),
        "attention": video.attention("What?").sum(axis=2).tolist(),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_model) -> SimpleNamespace:
    """A MODEL folder, clips, and what one process with one device says."""
    folder, config = tmp_path_factory.mktemp("processes"), presets.tiny()
    small = dataclasses.replace(config.vision, image_size=16)
    decoder = dataclasses.replace(config.decoder, num_layers=2)  # time goes into programs, as many as layers
    config = dataclasses.replace(config, vision=small, decoder=decoder)
    write_model(folder, config, seed=5)
    clips = write_dataset(folder / "clips", num_train=4, num_heldout=4, seed=0).heldout_videos[:3]
    loaded, device = load(folder / "model"), jax.devices()[:1]
    model = VideoModel(
        config, jax.device_put(jax.device_get(loaded.params), device[0]), loaded.tokenizer, loaded.processor,
        make_mesh(MeshConfig(), device),
    )  # fmt: skip
    clips = [str(clip) for clip in clips]
    missing = str(folder / "missing.mp4")
    return SimpleNamespace(
        folder=folder, clips=clips, missing=missing, expected=answers(model, clips, missing)
    )


def in_two_processes(port: int, flags: str, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, of one command for both or of one for each."""
    processes = [
        subprocess.Popen(
            [sys.executable, *commands[index % len(commands)]],
            env=os.environ | {
                "COORDINATOR_ADDRESS": f"localhost:{port}", "NUM_PROCESSES": "2", "PROCESS_ID": str(index),
                "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, re.sub(r"^\[Gloo\].*\n", "", output, flags=re.MULTILINE), errors)
        for process, (output, errors) in zip(processes, outputs, strict=True)
    ]


# sys.argv: folder, clips as JSON, a path without a file, the sizes of the mesh as JSON.
ANSWERING = """
    import json, sys
    from crosslmm_jax.config import MeshConfig
    from crosslmm_jax.errors import UserError
    from crosslmm_jax.inference import load
    from crosslmm_jax.parallel import initialize_processes
    from test_processes import answers
    initialize_processes()
    import jax
    folder, clips, missing, sizes = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    model = load(folder, mesh=MeshConfig(**sizes))
    assert dict(model.compiled.mesh.shape) == {"fsdp": 1, "context": 1, **sizes}
    weights = jax.tree.leaves(model.params)
    assert all(leaf.is_fully_replicated for leaf in weights) == (sizes["tensor"] == 1)
    found = answers(model, clips, missing)
    # One process lacks a file that the other has: both say so, and go on.
    try:
        model.watch(clips[0] if jax.process_index() else missing)
    except UserError as error:
        found["error"] = str(error)
    print(json.dumps(found))
"""


@pytest.mark.parametrize("sizes", [{"data": 1, "tensor": 2}, {"data": 2, "tensor": 1}])
def test_answers_equal_those_of_one_process(made, free_port, one_device_flags, sizes) -> None:
    words = [str(made.folder / "model"), json.dumps(made.clips), made.missing, json.dumps(sizes)]
    command = ["-c", textwrap.dedent(ANSWERING), *words]
    results = in_two_processes(free_port(), one_device_flags, command)
    assert [code for code, *_ in results] == [0, 0], results
    found = [json.loads(output.splitlines()[-1]) for _, output, _ in results]
    assert all(made.missing in each.pop("error") for each in found)
    assert found[0] == found[1]
    for name in ("ask", "chat", "many"):
        assert found[0][name] == made.expected[name], name
    for name in ("scores", "attention"):
        np.testing.assert_allclose(found[0][name], made.expected[name], rtol=1e-5, atol=1e-5)


def test_the_command_writes_once_and_continues(made, free_port, one_device_flags) -> None:
    """The answer that is there stays; only the first process writes and prints."""
    questions, out = made.folder / "questions.jsonl", made.folder / "answers.jsonl"
    rows = [
        {"video": video, "question": question}
        for video, question in (
            (made.clips[1], "Before?"), (made.clips[0], "What?"), (made.missing, "What?"),
            (made.clips[1], "Which colour?"),
        )
    ]  # fmt: skip
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.write_text(json.dumps({"line": 1, **rows[0], "response": "kept"}) + "\n")
    command = ["-m", "crosslmm_jax.cli", "ask", str(made.folder / "model"), "--questions", str(questions)]
    command += ["--out", str(out), "--max-new-tokens", "20", "--tensor", "2"]
    results = in_two_processes(free_port(), one_device_flags, command)
    assert [code for code, *_ in results] == [0, 0], results
    assert [output.strip() for _, output, _ in results] == [
        f"3 answers and 1 errors in {out}; the same command tries those with an error again", "",
    ]  # fmt: skip
    written = {row["line"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert len(out.read_text().splitlines()) == 4
    assert [written[line].get("response") for line in (1, 2, 3, 4)] == [
        "kept", made.expected["many"][0], None, made.expected["many"][3],
    ]  # fmt: skip
    assert made.missing in written[3]["error"]


def test_processes_with_other_questions_end(made, free_port, one_device_flags) -> None:
    commands = []
    for index in range(2):
        questions = made.folder / f"questions_{index}.jsonl"
        questions.write_text(json.dumps({"video": made.clips[0], "question": f"Number {index}?"}) + "\n")
        commands.append(["-m", "crosslmm_jax.cli", "ask", str(made.folder / "model")])
        commands[-1] += ["--questions", str(questions), "--out", str(made.folder / "none.jsonl")]
    for code, output, errors in in_two_processes(free_port(), one_device_flags, *commands):
        assert code == 2 and output == "", (output, errors)
        assert "the questions of process 1 are not those of process 0" in errors
    assert not (made.folder / "none.jsonl").exists()
