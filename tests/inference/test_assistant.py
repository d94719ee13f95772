"""From a MODEL folder and a file to answers."""

import dataclasses
import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image
from prompts import whole_prompt

from crosslmm_jax.batch import Batch
from crosslmm_jax.cli import main
from crosslmm_jax.data.media.video import read_frames
from crosslmm_jax.data.text.chat import question_suffix
from crosslmm_jax.data.text.layout import lay_out
from crosslmm_jax.data.text.time_instruction import ClipMeta, time_text
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import Medium, Sampling, VideoModel, commands, load
from crosslmm_jax.inference.assistant import Chat
from crosslmm_jax.inference.commands import ask
from crosslmm_jax.inference.figure import draw_attention
from crosslmm_jax.model import CrossLMM


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, write_model):
    folder = tmp_path_factory.mktemp("inference") / "run"
    return write_model(folder, system_prompt="You are a helpful assistant.").parent


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    made = write_dataset(tmp_path_factory.mktemp("clips"), num_train=4, num_heldout=4, seed=0)
    return made.heldout_videos[0]


@pytest.fixture(scope="module")
def model(model_folder):
    return load(model_folder)


def greedy(model, video, question: str, history, steps: int, time_text: str | None = None) -> list[int]:
    """Greedy tokens by one full forward pass each on one device, with the layout of training.

    All passes have one length: after the last token comes padding, which earlier tokens do not see.
    """
    sequence = whole_prompt(question, model.tokenizer, history=history, time_text=time_text)
    layout = lay_out(sequence, [len(video.frames)], tokens_per_frame=1, placeholder=model.tokenizer.video_pad)
    prompt, total = len(layout.tokens), len(layout.tokens) + steps
    visible = np.full(total, len(video.frames), np.int32)
    visible[:prompt] = layout.visible_frames
    tokens = np.zeros((1, total), np.int32)
    tokens[0, :prompt] = layout.tokens
    batch = Batch.create(
        tokens=tokens, visual_slots=np.flatnonzero(layout.visual)[None].astype(np.int32),
        visible_frames=visible[None], frames=video.frames[None],
    )  # fmt: skip
    params, network = jax.device_get(model.params), CrossLMM(model.config, stacked=False)
    forward = jax.jit(lambda tokens: network.apply({"params": params}, batch._replace(tokens=tokens)))
    for last in range(prompt - 1, total - 1):
        token = int(forward(tokens)[0, last, : model.tokenizer.vocab_size].argmax())
        if token == model.tokenizer.im_end:
            return tokens[0, prompt : last + 1].tolist()
        tokens[0, last + 1] = token
    return tokens[0, prompt:].tolist()


@pytest.mark.slow
def test_answers_equal_the_full_forward_and_are_independent(model, clip):
    video = model.watch(clip)
    first = video.ask("What shape is the red object?", max_new_tokens=5)
    expected = model.tokenizer.decode(greedy(model, video, "What shape is the red object?", (), 5))
    assert first == expected
    video.ask("What shape is the blue object?", max_new_tokens=5)
    assert video.ask("What shape is the red object?", max_new_tokens=5) == first


def test_chat_goes_on_from_what_was_said(model, clip):
    video = model.watch(clip)
    conversation = video.chat(max_new_tokens=4)
    questions = ("What shape is the red object?", "And now the blue one, or the green one?")
    answers = ["".join(conversation.ask(question)) for question in questions]
    expected = model.tokenizer.decode(greedy(model, video, questions[1], [(questions[0], answers[0])], 4))
    assert answers[1] == expected


@pytest.mark.slow
def test_a_long_conversation_outgrows_its_cache(model, clip):
    conversation = model.watch(clip).chat(max_new_tokens=4)
    before = conversation._said.prefix.cache.size
    for number in range(2):
        "".join(conversation.ask(f"Question {number}: {700 * '?'}"))
    assert conversation._said.prefix.cache.size > before


@pytest.mark.slow
def test_a_conversation_takes_further_media_and_another_answer(model, clip, tmp_path):
    """Two clips and a picture; answers equal those of a conversation that had them from the start."""
    from PIL import Image

    picture = tmp_path / "a.png"
    Image.fromarray(model.watch(clip).frames[1]).resize((40, 24)).save(picture)
    conversation = model.watch(clip).chat(max_new_tokens=4)
    first = "".join(conversation.ask("What shape is the red object?"))
    second = "".join(conversation.ask("And here?", [Medium(clip, start=0.5), picture.read_bytes()]))
    assert conversation.last is not None and conversation.last.text == second
    assert len(conversation._said.clips) == 3
    assert "".join(conversation.regenerate()) == second  # greedy
    third = "".join(conversation.ask("And what was first?"))
    assert conversation._said.prompt.num_media == 3

    together = model.watch([clip, Medium(clip, start=0.5), picture])
    assert len(together.frame_times) == 9 and together.prompt.num_media == 3
    other = model.watch(clip).chat(max_new_tokens=4)
    assert "".join(other.ask("What shape is the red object?")) == first
    clips = model.read([Medium(clip, start=0.5), picture])
    assert [len(read.frames) for read in clips] == [4, 1]
    assert "".join(other.ask("And here?", [Medium(clip, start=0.5), picture])) == second
    assert "".join(other.ask("And what was first?")) == third


@pytest.mark.slow
def test_a_failed_answer_leaves_the_conversation_as_it_was(model, clip):
    conversation = model.watch(clip).chat(max_new_tokens=6)
    with pytest.raises(UserError, match="ask a question first"):
        next(conversation.regenerate())
    "".join(conversation.ask("What shape is the red object?"))
    said, last = conversation._said, conversation.last
    with pytest.raises(UserError, match="positions"):
        "".join(conversation.ask("word " * 3000))
    with pytest.raises(UserError, match="missing"):
        "".join(conversation.ask("And here?", "missing.mp4"))
    stopped = conversation.ask("And the blue one?")
    next(stopped)
    stopped.close()
    assert conversation._said is said and conversation.last is last
    expected = "".join(conversation.ask("And the blue one?"))
    other = model.watch(clip).chat(max_new_tokens=6)
    "".join(other.ask("What shape is the red object?"))
    assert "".join(other.ask("And the blue one?")) == expected


@pytest.mark.slow
def test_answers_end_at_stop_texts_and_at_the_limit(model, clip):
    video, question = model.watch(clip), "What shape is the red object?"
    whole = video.answer(question, max_new_tokens=24)
    assert whole.finish_reason == "length" and whole.num_tokens == 24
    stop = whole.text[5:8]
    cut = video.answer(question, max_new_tokens=24, stop=["not in it", stop])
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.num_tokens < 24
    conversation = video.chat(max_new_tokens=24, stop=stop)
    pieces = list(conversation.ask(question))
    assert "".join(pieces) == cut.text
    kept = conversation._said.prompt.ids[-cut.num_tokens :].tolist() if cut.num_tokens else []
    assert cut.text.startswith(model.tokenizer.decode(kept))
    begun = video.answer(question, max_new_tokens=20, answer_prefix=whole.text[:4])
    assert begun.num_tokens == 20 and isinstance(begun.text, str)


@pytest.mark.slow
def test_every_end_token_ends_an_answer(model, clip, monkeypatch):
    video, question = model.watch(clip), "What shape is the red object?"
    conversation = video.chat(max_new_tokens=12)
    "".join(conversation.ask(question))
    ids = conversation._said.prompt.ids[-12:].tolist()
    assert set(model.ends) == {model.tokenizer.im_end, model.tokenizer.pad}
    monkeypatch.setattr(model, "ends", (*model.ends, ids[3]))
    answer = video.answer(question, max_new_tokens=12)
    assert answer.finish_reason == "stop" and answer.num_tokens <= 3


@pytest.mark.slow
def test_sampling_repeats_with_its_seed(model, clip):
    video = model.watch(clip, frames=2)
    assert video.frames.shape == (2, 32, 32, 3)
    warm = Sampling(2.0)
    texts = [video.ask("What?", max_new_tokens=8, sampling=warm, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_attention_is_a_distribution_over_patches(model, clip):
    video = model.watch(clip)
    maps = video.attention("What shape is the red object?")
    assert maps.shape == (2, 4, 16)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1, atol=1e-5)
    assert not np.allclose(maps, video.attention("What shape is the blue object?"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_trained_model_is_asked_in_8_bits(model, model_folder, clip, precision):
    """Weights are quantised when loaded, the video KV cache when made; attention stays close."""
    narrow = load(model_folder, precision)
    assert narrow.params["encoder"]["layers"]["0"]["w1"].dtype.itemsize == 1
    up, expected_up = (m.params["decoder"]["layers"]["0"]["w_up"] for m in (narrow, model))
    assert up.dtype == expected_up.dtype
    video = narrow.watch(clip)
    assert all(kv.keys.dtype.itemsize == 1 for kv in video.prefix.cache.t2v)
    question = "What shape is the red object?"
    maps, expected = video.attention(question), model.watch(clip).attention(question)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), 1, atol=1e-5)
    assert 0 < np.abs(maps - expected).max() < {"int8": 0.03, "fp8": 0.15}[precision] * expected.max()
    assert video.ask(question, max_new_tokens=5) == video.ask(question, max_new_tokens=5)


def crosslmm(*words: object) -> int:
    return main(["--debug", *map(str, words)])


@pytest.mark.slow
def test_commands(model_folder, clip, tmp_path, capsys, monkeypatch):
    options = ["--precision", "int8", "--max-new-tokens", 3]
    figure = tmp_path / "a.png"
    assert not crosslmm("ask", model_folder, clip, "What?", "--json", "-", "--attention", figure, *options)
    report = json.loads(capsys.readouterr().out)
    assert report["question"] == "What?" and len(report["frame_times"]) == 4
    assert report["tokens_per_second"] > 0 and report["tokens"] <= 3
    assert "timings" not in report
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert not crosslmm("ask", model_folder, clip, "What?", "--json", "-", "--timings", *options)
    again = json.loads(capsys.readouterr().out)
    assert again["answer"] == report["answer"]
    timings = again["timings"]
    phases = ["imports", "load", "decode", "encode", "prefill", "answer"]
    assert timings["total"] == pytest.approx(sum(timings[phase] for phase in phases), abs=1e-3)
    assert 0 < timings["first_token"] <= timings["answer"]
    assert 0 < timings["tokenizer"] and 0 < timings["weights"] <= timings["load"]
    lines = iter(["What shape is the red object?", "And the blue one?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert not crosslmm("chat", model_folder, clip, *options)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    "change,message",
    [
        (["", "clip", "  "], "question"),
        (["", "clip", "What?", "--frames", 0], "--frames"),
        (["", "clip", "What?", "--frames", 100000], "--frames"),
        (["", "clip", "What?", "--max-new-tokens", 0], "--max-new-tokens"),
        (["", "clip", "What?", "--max-new-tokens", 5000], "positions"),
        (["", "clip", "What?", "--top-p", 0.0], "--top-p"),
        (["", "clip", "What?", "--temperature", "nan"], "--temperature"),
        (["", "clip", "What?", "--stop", ""], "stop"),
        (["", "missing.mp4", "What?"], "missing.mp4"),
        (["", "clip", "What?", "--start", 2, "--end", 1], "0 <= start < end"),
        (["", "clip", "What?", "--start", 100], "no frames between 100"),
        (["", "--questions", "a.jsonl", "--out", "b.jsonl", "--start", 0], "leave --start out"),
        (["missing", "clip", "What?"], "missing"),
        (["", "clip", "What?", "--json", "no/such/folder.json"], "--json"),
        (["", "clip", "What?", "--attention", "no/such/folder.png"], "--attention"),
        (["", "clip"], "VIDEO and QUESTION, or --questions and --out"),
        (["", "clip", "What?", "--out", "a.jsonl"], "belong to --questions"),
        (["", "--questions", "a.jsonl"], "needs --out"),
        (["", "clip", "--questions", "a.jsonl", "--out", "b.jsonl"], "leave VIDEO out"),
        (["", "--questions", "a.jsonl", "--out", "b.jsonl", "--timings"], "leave --timings out"),
        (["", "--questions", "missing.jsonl", "--out", "b.jsonl"], "missing.jsonl: cannot be read"),
    ],
)
def test_bad_input_is_one_clear_error(model_folder, clip, change, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        {"": model_folder, "clip": clip}.get(word, word) if i < 2 else word for i, word in enumerate(change)
    ]
    assert main(["ask", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("ask", ["clip", "What?", "--max-new-tokens", 5000], "--max-new-tokens is 5000; this model has"),
        ("ask", ["clip", "What?", "--temperature", "nan"], "--temperature nan"),
        ("ask", ["clip", "What?", "--attention", "map"], "--attention map: end the name in .png, .jpg"),
        ("ask", ["clip", "What?", "--attention", "map.bmp"], "--attention map.bmp: end the name in .png"),
        ("chat", ["clip", "--max-new-tokens", 5000], "--max-new-tokens is 5000; this model has"),
        ("chat", ["clip", "--top-p", "nan"], "--top-p nan"),
        ("chat", ["gone.mp4"], "gone.mp4"),
        (
            "ask",
            ["--questions", "q.jsonl", "--out", "o", "--max-new-tokens", 5000],
            "--max-new-tokens is 5000",
        ),
        ("ask", ["--questions", "q.jsonl", "--out", "o", "--temperature", "nan"], "error: --temperature nan"),
    ],
)
def test_options_are_checked_before_weights_are_read(
    model_folder, clip, command, words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(json.dumps({"video": str(clip), "question": "What?"}) + "\n")
    monkeypatch.setattr(
        "crosslmm_jax.inference.commands.load", lambda *_, **__: pytest.fail("weights are read")
    )
    assert (
        main([command, str(model_folder), *(str(clip) if word == "clip" else str(word) for word in words)])
        == 2
    )
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("a.png", b"\x89PNG"),
        ("a.JPG", b"\xff\xd8\xff"),
        ("a.svg", b"<?xml"),
    ],
)
def test_a_figure_of_attention_is_what_its_name_says(tmp_path, name, begin):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    draw_attention(
        tmp_path / name, frames.__getitem__, np.arange(2.0), np.full((1, 2, 4), 0.125), title="What?"
    )
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.fixture
def chat(model, clip, monkeypatch, capsys):
    """`chat(*lines)`: exit code, answers and messages of a chat in which a user types these lines."""

    def run(*lines: object):
        typed = iter(lines)

        def read(prompt: str) -> str:
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return str(line)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("crosslmm_jax.inference.commands.load", lambda *_, **__: model)
        code = main(["chat", str(model.tokenizer.folder), str(clip), "--max-new-tokens", "4"])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def test_a_question_that_is_too_long_is_refused_and_the_chat_goes_on(chat, model):
    alone = chat("What shape is it?", "")
    too_long = "very " * model.config.decoder.max_positions
    bad = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid")
    code, answers, errors = chat(too_long, "half \ud800", bad, "What shape is it?", "")
    assert (code, answers) == (0, alone[1]) and len(answers) == 1
    assert [error.startswith("crosslmm: error: ") for error in errors] == [True] * 3
    assert "positions: ask a shorter question" in errors[0]
    assert "half of a character" in errors[1] and "is not UTF-8" in errors[2]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("late", [False, True])
def test_ctrl_c_stops_an_answer_and_leaves_at_the_next_prompt(chat, monkeypatch, late):
    """What is said of the question is true, also if its answer was complete when Ctrl-C came."""
    questions = ["What shape is it?", "Which colour?"]
    alone = chat(*(questions if late else questions[1:]), "")
    ask_chat = Chat.ask

    def interrupted(self, question):
        pieces = ask_chat(self, question)
        if question == questions[0]:
            yield from pieces if late else [next(pieces)]
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)  # until Python has seen the signal
        yield from pieces

    monkeypatch.setattr(Chat, "ask", interrupted)
    code, answers, errors = chat(*questions, KeyboardInterrupt())
    assert code == 130 and answers[-1] == alone[1][-1], "as if the first question had not been asked"
    assert len(answers) == 2 and answers[0]
    said = "counts: its answer was complete" if late else "does not count"
    assert errors == [f"(stopped; the question {said}. Ctrl-C again leaves)", ""]


@pytest.mark.slow
def test_a_model_without_t2v_has_no_attention_to_draw(model, clip):
    cross = dataclasses.replace(model.config.cross_attention, directions=("v2v",))
    config = dataclasses.replace(model.config, cross_attention=cross)
    without_t2v = VideoModel(config, model.params, model.tokenizer, model.processor, model.compiled.mesh)
    video = without_t2v.watch(clip)
    assert isinstance(video.ask("What?", max_new_tokens=2), str)
    with pytest.raises(UserError, match="T2V"):
        video.attention("What?")


def test_attention_without_t2v_is_refused_before_the_video_is_read(model_folder, tmp_path):
    folder = shutil.copytree(model_folder / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["cross_attention"]["directions"] = ["v2v"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"--attention a\.png: .*model has no T2V"):
        ask(
            str(folder), "missing.mp4", "What?", frames=None, precision=None, attention_path="a.png",
            options={},
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["short", "full"])
def test_a_video_is_introduced_as_in_training(model, clip, kind):
    processor = dataclasses.replace(model.processor, time_instruction=kind)
    with_times = VideoModel(model.config, model.params, model.tokenizer, processor, model.compiled.mesh)
    video = with_times.watch(clip)
    decoded = read_frames(clip, processor.sampling, size=32)
    text = time_text(ClipMeta(4, decoded.duration, decoded.times.tolist()), kind)
    assert text is not None and f"lasts for {decoded.duration:.2f} seconds, and 4 frames" in text
    question = "What shape is the red object?"
    expected = greedy(model, video, question, (), 2, time_text=text)
    assert video.ask(question, max_new_tokens=2) == model.tokenizer.decode(expected)
    prompt = whole_prompt(question, model.tokenizer, time_text=text)
    suffix = len(question_suffix(question, model.tokenizer).ids)
    assert video.prefix.lengths[0] == prompt.num_text_tokens - suffix + 4


def test_frames_and_their_times_must_leave_room_for_a_question(model, clip):
    processor = dataclasses.replace(model.processor, time_instruction="full")
    with_times = VideoModel(model.config, model.params, model.tokenizer, processor, model.compiled.mesh)
    frames = model.config.decoder.max_positions // 8
    assert model.watch(clip, frames=frames).frames.shape[0] == frames
    with pytest.raises(UserError, match="300 frames and the text about them take .* fewer --frames"):
        with_times.watch(clip, frames=300)


def test_pictures_are_not_refused_for_the_frames_of_videos(model, model_folder, tmp_path, monkeypatch):
    """200 of them may have as many frames as 200 videos, and have one each."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert 200 * 16 > model.config.decoder.max_positions
    monkeypatch.setattr(commands, "load", lambda *_, **__: pytest.fail("came to the weights"))
    with pytest.raises(pytest.fail.Exception, match="came to the weights"):
        commands.ask(
            str(model_folder), [tmp_path / "a.png"] * 200, "What?", frames=16, precision=None,
            attention_path=None, options={},
        )  # fmt: skip


@pytest.mark.slow
def test_more_frames_than_positions_are_refused_or_read_by_yarn(model_folder, clip, tmp_path, capsys, caplog):
    folder = shutil.copytree(model_folder, tmp_path / "run")
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["decoder"]["max_positions"] = 300
    path.write_text(json.dumps(config))
    question = ("What shape is the red object?", "--frames", 60, "--max-new-tokens", 4, "--json", "-")
    assert crosslmm("ask", folder, clip, *question) == 2
    assert "--frames is 60; this model has positions for 44 at most: read fewer --frames, or give --yarn" in (
        capsys.readouterr().err
    )
    assert crosslmm("ask", folder, clip, *question, "--frames", 44) == 0
    capsys.readouterr()
    figure = ("--attention", tmp_path / "a.png")  # a long video's frames are read again for it
    assert crosslmm("ask", folder, clip, *question, "--yarn", "--frames", 600, *figure) == 0
    assert figure[1].read_bytes()[:4] == b"\x89PNG"
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["yarn_factor"] == 3 and len(report["frame_times"]) == 600
    assert re.match(r"600 frames take 600 positions and [\d.]+ MB beside the weights: original", output.err)
    assert not caplog.records
    scaled = load(folder, yarn_frames=60)
    assert (scaled.config.decoder.max_positions, scaled.config.decoder.yarn_trained_positions) == (600, 300)
    video = scaled.watch(clip, frames=60)
    ids = greedy(scaled, video, question[0], (), 4)
    assert video.ask(question[0], max_new_tokens=4) == scaled.tokenizer.decode(ids)
    load(folder, yarn_frames=1000)
    assert "positions are scaled by 5 (YaRN); Qwen2.5 documents factors up to 4 only" in caplog.text


def test_warm_up_leaves_out_what_the_decoder_has_no_positions_for(model, monkeypatch):
    decoder = dataclasses.replace(model.config.decoder, max_positions=330)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, decoder=decoder))
    # Each frame's time is a part of the text.
    monkeypatch.setattr(model, "processor", dataclasses.replace(model.processor, time_instruction="full"))
    watched, watch = [], model.watch_frames
    monkeypatch.setattr(
        model, "watch_frames", lambda frames, *rest: watched.append(len(frames)) or watch(frames, *rest)
    )
    model.warm_up()
    assert watched == [4]
