"""From a MODEL folder and a file to answers."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from prompts import whole_prompt

from crosslmm_jax.batch import Batch
from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.data.media.video import read_frames
from crosslmm_jax.data.text.chat import question_suffix
from crosslmm_jax.data.text.layout import lay_out
from crosslmm_jax.data.text.time_instruction import ClipMeta, time_text
from crosslmm_jax.demo.synthetic import write_dataset
from crosslmm_jax.demo.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import Sampling, VideoModel, load
from crosslmm_jax.inference.commands import ask, chat
from crosslmm_jax.model import CrossLMM, init_params
from crosslmm_jax.model_folder import save_model_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from crosslmm_jax import presets

    folder = tmp_path_factory.mktemp("inference")
    write_default_tokenizer(folder / "tokenizer")
    config = presets.tiny()
    save_model_folder(
        folder / "run" / "model",
        config=config,
        params=init_params(config, jax.random.key(0)),
        tokenizer_folder=folder / "tokenizer",
        sampling=SamplingConfig(frames=4),
        system_prompt="You are a helpful assistant.",
    )
    return folder / "run"


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
    conversation = model.watch(clip).chat(max_new_tokens=300)
    before = conversation._said.prefix.cache.size
    for number in range(5):
        "".join(conversation.ask(f"Question {number}: what shape is the red object?"))
    assert conversation._said.prefix.cache.size > before


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


@pytest.mark.slow
def test_commands(model_folder, clip, tmp_path, capsys, monkeypatch):
    options = {
        "frames": None, "precision": "int8", "max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0,
    }  # fmt: skip
    ask(
        str(model_folder),
        str(clip),
        "What?",
        json_path="-",
        attention_path=str(tmp_path / "a.png"),
        **options,
    )
    report = json.loads(capsys.readouterr().out)
    assert report["question"] == "What?" and len(report["frame_times"]) == 4
    assert report["tokens_per_second"] > 0
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    lines = iter(["What shape is the red object?", "And the blue one?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat(str(model_folder), str(clip), **options)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    "change,message",
    [
        ({"question": "  "}, "question"),
        ({"frames": 0}, "--frames"),
        ({"frames": 100000}, "--frames"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"max_new_tokens": 5000}, "positions"),
        ({"top_p": 0.0}, "--top-p"),
        ({"video": "missing.mp4"}, "missing.mp4"),
        ({"model": "missing"}, "missing"),
        ({"json_path": "no/such/folder.json"}, "--json"),
        ({"attention_path": "no/such/folder.png"}, "--attention"),
    ],
)
def test_bad_input_is_one_clear_error(model_folder, clip, change, message):
    arguments = {
        "model": str(model_folder), "video": str(clip), "question": "What?", "frames": None,
        "precision": None, "json_path": None, "attention_path": None, "max_new_tokens": 3,
        "temperature": 0.0, "top_p": 1.0, "seed": 0,
    } | change  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        ask(**arguments)
    assert "\n" not in str(error.value)


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
            str(folder), "missing.mp4", "What?", frames=None, precision=None, json_path=None,
            attention_path="a.png", max_new_tokens=3, temperature=0.0, top_p=1.0, seed=0,
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
    with pytest.raises(UserError, match=f"{frames} frames and the text about them take .* fewer --frames"):
        with_times.watch(clip, frames=frames)
