"""`python -m perf ask`: what it asks for, its MODEL folder, its work, and its bars."""

import argparse
import json
from pathlib import Path
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.data.text import load_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.model import init_params
from crosslmm_jax.profiling import Request, suite
from crosslmm_jax.profiling.report import new_report
from perf.__main__ import main
from perf.ask import folder, inputs, many, peer
from perf.ask.command import PRESENTATION
from perf.bars import with_bars
from perf.clips import RATE, write_clip


def asked_by(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    asked: list[Request] = []
    nothing = {"request": {}, "facts": {}, "rows": [], "errors": []}
    monkeypatch.setattr(suite, "_measure", lambda request, _: asked.append(request) or nothing)
    assert main(["ask", *words]) == 0
    return asked


def test_each_measure_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked_by(["--work", "w", "--tokenizer", "t"], monkeypatch)
    assert [(one.task.rpartition(".")[2], one.system) for one in asked] == [
        ("folder", "crosslmm_2b"), ("ask", "crosslmm_2b"), ("many", "crosslmm_2b"), ("inputs", "crosslmm_2b"),
        ("inputs", "crosslmm_2b"), ("folder", "crosslmm_7b"), ("ask", "crosslmm_7b"),
        ("peer", "llava-onevision-7b"),
    ]  # fmt: skip
    ours, theirs = (one for one in asked[-2:])
    for field in ("video", "question", "max_new_tokens", "frames", "repeats", "model"):
        assert getattr(ours, field) == getattr(theirs, field), "the same work"
    few = asked_by(["--preset", "crosslmm_2b", "--measures", "inputs"], monkeypatch)
    assert [one.task.rpartition(".")[2] for one in few] == ["folder", "inputs", "inputs"]


@pytest.mark.parametrize("tied", [True, False])
def test_no_answer_ends_by_itself(tied: bool, tokenizer_folder: Path, replace_config) -> None:
    config = replace_config(presets.tiny(), decoder={"tie_embeddings": tied})
    tokenizer = load_tokenizer(tokenizer_folder)
    params = init_params(config, jax.random.key(0))
    changed = folder.without_ends(params, config, tokenizer)["decoder"]
    ends = [tokenizer.im_end, tokenizer.pad]
    heads = [jnp.asarray(of["embedding"].T if tied else of["lm_head"]) for of in (params["decoder"], changed)]
    hidden = jax.random.normal(jax.random.key(1), (100, config.decoder.width))
    before, after = (np.asarray(hidden @ head) for head in heads)
    assert np.all(after[:, ends] == 0) and np.all(after.max(axis=1) > 0)
    others = np.setdiff1d(np.arange(config.decoder.vocab_size), ends)
    np.testing.assert_array_equal(after[:, others], before[:, others])
    assert {name for name in changed if changed[name] is not params["decoder"][name]} == {
        "embedding" if tied else "lm_head"
    }


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    request = folder.FolderRequest(
        task="",
        system="tiny",
        frames=(2,),
        folder=str(tmp_path / "m"),
        tokenizer=str(tmp_path),
        work=str(tmp_path),
    )
    with pytest.raises(UserError, match="has no tokenizer.json"):
        folder.write_folder(request, presets.tiny())


def test_questions_come_with_their_video(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.mp4", "c.txt"):
        (tmp_path / name).touch()
    work = many.work_of(tmp_path)
    assert [Path(path).name for path, _ in work] == ["a.mp4"] * 3 + ["b.mp4"] * 3
    assert len({question for _, question in work}) == 3


def test_both_ways_answer_every_question() -> None:
    class Model:
        def __init__(self) -> None:
            self.watched: list[str] = []

        def watch(self, path: str, frames: int) -> "Model":
            self.watched.append(path)
            return self

        def answer(self, question: str, max_new_tokens: int) -> argparse.Namespace:
            return argparse.Namespace(num_tokens=max_new_tokens)

    work = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    alone, kept = Model(), Model()
    assert many.one_by_one(alone, work, 4) == many.videos_kept(kept, work, 4) == 4 * many.TOKENS  # type: ignore[arg-type]
    assert alone.watched == ["a", "a", "b", "b"] and kept.watched == ["a", "b"]


def test_rows_for_a_batch(tmp_path: Path) -> None:
    request = inputs.InputRequest(
        task="",
        system="tiny",
        frames=(2,),
        what="index",
        model="m",
        videos=str(tmp_path),
        work=str(tmp_path),
        workers=1,
    )
    with pytest.raises(UserError, match="holds no .mp4 file"):
        inputs.write_rows(request)
    for number in range(10):
        (tmp_path / f"{number}.mp4").touch()
    inputs.write_rows(request)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) >= inputs.BATCH and {row["video"] for row in rows} == {f"{n}.mp4" for n in range(10)}


def test_the_documented_loop_takes_the_frames_that_it_should(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_clip(path, seconds=1, seed=0)
    with av.open(str(path)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == RATE
    found = peer.documented(str(path), 4)
    np.testing.assert_array_equal(found, np.stack([every[n] for n in (0, 8, 16, 24)]))


def row(system: str, what: str, seconds: float, **fields: Any) -> dict[str, Any]:
    return {
        "system": system, "what": what, "frames": 256, "tokens": 64, "ms": 1e3 * seconds,
        "ms_min": 1e3 * seconds, "ms_max": 1e3 * seconds, "tokens_per_second": 64 / seconds,
        "phases_s": {"answer": seconds}, **fields,
    }  # fmt: skip


def test_bars_read_the_rows() -> None:
    found = new_report("ask", command="")
    same = "warm process, the same clip"
    seconds = {
        "first process": 60, "new process": 11, "warm process, another clip": 0.7, "further answer": 0.16,
        "warm process, fewer frames": 1.6, "questions one by one": 20, "questions together": 5,
        "questions one by one, videos kept": 8, "first batch of 16": 5,
    }  # fmt: skip
    found["rows"] = [
        *(row("crosslmm_2b", what, value) for what, value in seconds.items()),
        row("crosslmm_2b", "data index, 16 workers", 3, cpu_s=18.0),
        row("crosslmm_7b", same, 1.5), row("llava-onevision-7b", same, 9),
    ]  # fmt: skip
    bars = {
        bar["what"]: (bar["reading"], bar["meets_bar"], bar["meets_goal"]) for bar in with_bars(found)["bars"]
    }
    assert list(bars.values()) == [
        (11, True, False), (pytest.approx(0.16), True, True), (400, True, False),
        (pytest.approx(1.6), False, False), (6, True, True), (4, True, False), (18, True, False),
        (5, True, False),
    ]  # fmt: skip
    found["rows"][-1]["tokens"] = 32
    assert len(with_bars(found)["bars"]) == 7, "an answer of another length is no comparison"
    page = PRESENTATION.page(found)
    assert "| crosslmm_7b | warm process, the same clip | 256 | 64 |" in page and "| bar | goal |" in page
    assert PRESENTATION.fields(found)["bars"] and "seconds" in PRESENTATION.fields(found)["units"]
