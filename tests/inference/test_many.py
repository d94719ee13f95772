"""Many questions: each answer as if asked alone, each video decoded and encoded once; scores of options."""

import dataclasses
import json
import threading
import weakref
from collections import Counter

import jax
import numpy as np
import pytest

from crosslmm_jax.cli import main
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.data.media import from_bytes
from crosslmm_jax.data.text import question_suffix
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import (
    Answer,
    Item,
    Medium,
    Sampling,
    VideoModel,
    answer_many,
    answers_as_ready,
    devices,
    load,
    score_options,
    watching,
)
from crosslmm_jax.inference import many as many_module
from crosslmm_jax.inference.compiled import Compiled
from crosslmm_jax.inference.replies import AnswerOptions
from crosslmm_jax.parallel import make_mesh

QUESTIONS = (
    "What shape is the red object?",
    "And?",
    "Which colour has the circle, and which the square?",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_model):
    return write_model(tmp_path_factory.mktemp("many"), seed=1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("clips"), num_train=4, num_heldout=4, seed=0).heldout_videos


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


def options_of(number: int) -> AnswerOptions:
    """Other lengths, sampling, seeds and stop texts in each row."""
    sampling = Sampling(1.5, 0.9) if number % 2 else Sampling()
    stop = ("e",) if number % 3 == 2 else ()
    return AnswerOptions(max_new_tokens=3 + 4 * number, sampling=sampling, seed=number, stop=stop)


@pytest.mark.slow
@pytest.mark.parametrize("videos_at_once", [1, 3])
def test_answers_equal_those_of_single_questions(model, clips, videos_at_once):
    items = [
        Item(clip if number < 2 else Medium(clip, end=1.0), question, options_of((number + place) % 5))
        for number, clip in enumerate(clips[:3])
        for place, question in enumerate(QUESTIONS[: number + 1])
    ]
    got = dict(answers_as_ready(model, items, videos_at_once=videos_at_once))
    assert sorted(got) == list(range(len(items)))
    for number, item in enumerate(items):
        option = item.options
        alone = model.watch(item.media).answer(
            item.question, max_new_tokens=option.max_new_tokens, sampling=option.sampling, seed=option.seed,
            stop=option.stop,
        )  # fmt: skip
        assert (got[number].text, got[number].num_tokens) == (alone.text, alone.num_tokens), item
        assert got[number].finish_reason == alone.finish_reason


@pytest.mark.slow
def test_ten_questions_decode_and_encode_once(model, clips, monkeypatch):
    counts: Counter[str] = Counter()

    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    model.watch(clips[0])  # the blank frames of padding are encoded once per model
    monkeypatch.setattr(type(model), "read", counting("decode", type(model).read))
    for name in ("encode", "prefill", "read"):
        monkeypatch.setattr(Compiled, name, counting(name, getattr(Compiled, name)))
    monkeypatch.setattr(many_module, "MOST_ROWS", 8)
    items = [Item(clips[0], f"Question {number}?", AnswerOptions(max_new_tokens=2)) for number in range(10)]
    assert len(answer_many(model, items)) == 10
    assert counts == {"decode": 1, "encode": 1, "prefill": 1, "read": 2}


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_made_smaller(model, clips, monkeypatch):
    """Of four videos two fit together, with four questions about each in two rounds."""
    sizes: list[tuple[str, int]] = []

    def noted(name, function, count):
        return lambda *args, **named: (sizes.append((name, count(args))), function(*args, **named))[1]

    monkeypatch.setattr(
        devices.BatchMemory, "fits", lambda self, frames, videos, questions=1: videos * questions <= 4
        and videos <= 2,
    )  # fmt: skip
    prefill, read = model.compiled.prefill, model.compiled.read
    monkeypatch.setattr(model.compiled, "prefill", noted("videos", prefill, lambda args: len(args[1])))
    monkeypatch.setattr(model.compiled, "read", noted("rows", read, lambda args: len(args[2])))
    short = AnswerOptions(max_new_tokens=2)
    items = [Item(clip, f"Question {n}?", short) for clip in clips[:4] for n in range(4)]
    got = answer_many(model, items, videos_at_once=4)
    assert sizes == [("videos", 2), ("rows", 4), ("rows", 4)] * 2
    alone = model.watch(clips[3]).ask("Question 2?", max_new_tokens=2)
    assert isinstance(got[14], Answer) and got[14].text == alone


@pytest.mark.slow
def test_long_videos_are_watched_one_by_one_without_their_pixels(model, clips, monkeypatch):
    """On one device."""
    for module in (many_module, watching):
        monkeypatch.setattr(module, "keeps_pixels", lambda frames: frames <= 2)
    device = jax.devices()[:1]
    one = VideoModel(
        model.config, jax.device_put(jax.device_get(model.params), device[0]), model.tokenizer,
        model.processor, make_mesh(MeshConfig(), device),
    )  # fmt: skip
    watched, watch = [], one.watch

    def noted(*args, **named):
        assert not any(video() for video in watched), "the caches of two long videos exist at once"
        video = watch(*args, **named)
        watched.append(weakref.ref(video))
        return video

    monkeypatch.setattr(one, "watch", noted)
    short = AnswerOptions(max_new_tokens=3)
    items = [Item(clips[0], "What?", short), Item(clips[0], "And?", short), Item("missing.mp4", "What?")]
    first, second, third = answer_many(one, items)
    assert isinstance(third, UserError) and len(watched) == 1
    video = watch(clips[0])
    assert isinstance(video.clips[0], watching.UnkeptClip)
    assert [first.text, second.text] == [video.ask(text, max_new_tokens=3) for text in ("What?", "And?")]


@pytest.mark.slow
def test_an_error_belongs_to_its_question(model, clips):
    short = AnswerOptions(max_new_tokens=2)
    items = [
        Item("missing.mp4", "What?", short), Item(clips[0], "What?", short), Item(clips[0], " ", short),
        Item(clips[0], "What?", AnswerOptions(max_new_tokens=4000)), Item(clips[1], "What?", short),
    ]  # fmt: skip
    got = answer_many(model, [item[:3] for item in items], videos_at_once=2)
    assert [isinstance(got[number], UserError) for number in range(5)] == [True, False, True, True, False]
    assert "missing.mp4" in str(got[0]) and "question" in str(got[2]) and "positions" in str(got[3])


@pytest.mark.slow
def test_a_question_fits_whatever_its_neighbours_have(model, clips, monkeypatch):
    """A row without a question does not need the positions of another row's."""
    decoder = dataclasses.replace(model.config.decoder, max_positions=500)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, decoder=decoder))
    items = [
        Item([clips[0]] * 10, "What?", AnswerOptions(max_new_tokens=2)),
        Item(clips[1], "What?", AnswerOptions(max_new_tokens=2)),
        Item(clips[1], "?" * 445, AnswerOptions(max_new_tokens=2)),
    ]
    got = answer_many(model, items, videos_at_once=2)
    assert [answer.num_tokens for answer in got] == [2, 2, 2]
    assert model.watch([clips[0]] * 10).prefix.lengths[0] + 445 > 500
    with pytest.raises(UserError, match="videos_at_once"):
        answer_many(model, items, videos_at_once=-1)


def test_media_in_memory_are_told_apart(clips):
    first, second = (from_bytes(clip.read_bytes()) for clip in clips[:2])
    assert many_module._key(first) != many_module._key(second)
    assert many_module._key(first) == many_module._key(first)
    assert (
        many_module._key(clips[0]) == many_module._key(str(clips[0])) != many_module._key(Medium(clips[0], 1))
    )


@pytest.mark.slow
def test_who_stops_early_does_not_wait_for_videos_that_were_not_begun(model, clips, monkeypatch):
    begun, read, go_on = [], model.read, threading.Event()

    def slow_after_the_first(*args, **named):
        begun.append(1)
        if len(begun) > 1:
            go_on.wait(60)
        return read(*args, **named)

    monkeypatch.setattr(model, "read", slow_after_the_first)
    short = AnswerOptions(max_new_tokens=1)
    items = [Item(Medium(clips[0], end=1 + 0.01 * number), "What?", short) for number in range(16)]
    answers = answers_as_ready(model, items, videos_at_once=1)
    next(answers)
    threading.Timer(0.5, go_on.set).start()
    answers.close()
    assert len(begun) <= 1 + many_module.DECODERS


@pytest.mark.slow
def test_attention_of_a_question_that_outgrows_the_cache(model, clips):
    """The map of a long question is that of a cache that had room from the start."""
    video, question = model.watch(clips[0]), "?" * 1300
    maps = video.attention(question)
    roomy = model.with_room(video.prefix.cache, 2000)
    expected = model.compiled.observe(model.params, roomy, question_suffix(question, model.tokenizer).ids)
    np.testing.assert_allclose(maps, np.asarray(expected)[:, 0, : len(video.frame_times)], atol=1e-6)
    assert not np.allclose(maps, video.attention(question, answer_prefix="It is"))


@pytest.mark.slow
def test_scores_are_log_probabilities_of_the_options(model, clips):
    """Against one forward pass per option."""
    video, question = model.watch(clips[0]), QUESTIONS[0]
    options = ["red", "a blue square", "B"]
    scores = score_options(video, question, options, answer_prefix="It is ")
    asked = question_suffix(question, model.tokenizer, answer_prefix="It is ").ids
    size = model.tokenizer.vocab_size
    for option, score in zip(options, scores, strict=True):
        expected, ids = 0.0, asked
        for token in model.tokenizer.encode_plain(option):
            rows = AnswerOptions(max_new_tokens=1).row(model.ends)
            cache = video.prefix.cache
            _, logits, _ = model.compiled.read(model.params, cache, [ids], rows, vocab_size=size)
            logits = np.asarray(logits, np.float64)[0, :size]
            expected += logits[token] - np.logaddexp.reduce(logits)
            ids = np.append(ids, np.int32(token))
        assert score == pytest.approx(expected, abs=1e-4)
    letters = score_options(video, question, ["A", "B"], answer_prefix="It is ")
    assert letters[1] == pytest.approx(scores[2], abs=1e-5)
    for wrong in ([], ["a", ""]):
        with pytest.raises(UserError, match="options are"):
            score_options(video, question, wrong)


@pytest.mark.slow
def test_a_file_of_questions_is_answered_and_resumed(folder, clips, tmp_path, capsys, monkeypatch):
    rows = [
        {"id": "a", "video": clips[0].name, "question": QUESTIONS[0], "max_new_tokens": 3},
        {"id": "b", "video": "missing.mp4", "question": "What?"},
        {"id": "c", "video": [clips[0].name, clips[1].name], "question": "Ünd?", "start": 0.0, "end": 1.0},
    ]
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    words = ["ask", str(folder), "--questions", str(questions), "--out", str(out)]
    words += ["--media-root", str(clips[0].parent), "--max-new-tokens", "2"]
    assert main(words) == 0
    assert "2 answers and 1 errors" in capsys.readouterr().out
    answers = sorted(map(json.loads, out.read_text().splitlines()), key=lambda answer: answer["line"])
    assert [answer["line"] for answer in answers] == [1, 2, 3]
    assert answers[0]["tokens"] == 3 and answers[2]["tokens"] == 2 and answers[2]["id"] == "c"
    assert "missing.mp4" in answers[1]["error"] and "response" not in answers[1]
    # Stopped in the middle of the last line; the missing video has come; the first answer is not made again.
    marked = json.dumps(answers[0] | {"response": "kept"})
    out.write_text(marked + "\n" + json.dumps(answers[2])[:40])
    rows[1]["video"] = clips[1].name
    questions.write_text("\n".join(json.dumps(row) for row in rows))
    assert main(words) == 0
    assert "3 answers and 0 errors" in capsys.readouterr().out
    again = {row["line"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert again[1]["response"] == "kept" and again[3] == answers[2] and again[2]["tokens"] == 2
    monkeypatch.setattr("crosslmm_jax.inference.commands.load", lambda *_: pytest.fail("nothing is left"))
    assert main(words) == 0


@pytest.mark.parametrize("content", ['{"video": "a.mp4", "question": "What?"}', "notes", '{"line": 1'])
def test_a_file_that_is_not_its_own_is_not_overwritten(folder, tmp_path, capsys, content):
    """The file of questions itself, for one."""
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"video": "a.mp4", "question": "What?"}\n')
    out = questions if "video" in content else tmp_path / "a.jsonl"
    words = ["ask", folder, "--questions", questions, "--out", out]
    for text in {content + "\n", content if content[:6] != '{"line' else content + "\n"}:
        out.write_text(text)
        assert main([str(word) for word in words]) == 2
        assert "line 1: no answer that this command wrote; name another file" in capsys.readouterr().err
        assert out.read_text() == text


@pytest.mark.parametrize(
    "line,message",
    [
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: write an object"),
        ('{"question": "a"}', 'line 1: "video" must be'),
        ('{"video": "a.mp4"}', 'line 1: "question" must be'),
        ('{"video": "a.mp4", "question": " "}', "line 1: question is empty"),
        (
            '{"video": "a.mp4", "question": "\\ud83d?"}',
            "half of a character",
        ),
        ('{"video": [], "question": "a"}', '"video" must be'),
        ('{"video": "a", "question": "a", "start": "1"}', '"start" must be a number'),
        ('{"video": "a", "question": "a", "response": ""}', '"response" is a key of the answers'),
        ('{"video": "a", "question": "a", "max_new_tokens": 0}', "line 1: --max-new-tokens is 0"),
        ('{"video": "a", "question": "a", "max_new_tokens": "b"}', "line 1: max_new_tokens is 'b'"),
        ('{"video": "a", "question": "a", "seed": 1.5}', "line 1: seed is 1.5"),
        ('{"video": "a", "question": "a", "answer_prefix": 5}', "line 1: answer_prefix is 5"),
        ('{"video": "a", "question": "a", "stop": [5]}', "line 1: stop is [5]"),
    ],
)
def test_a_wrong_line_is_named(folder, tmp_path, capsys, line, message):
    (tmp_path / "q.jsonl").write_text(line)
    words = ["ask", folder, "--questions", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl"]
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a.jsonl").exists()
