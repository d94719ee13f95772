"""From a MODEL folder and a file to answers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from crosslmm_jax.config import SamplingConfig
from crosslmm_jax.convert.folder import save_model_folder
from crosslmm_jax.data.collate import lay_out
from crosslmm_jax.data.conversation import prompt_segments
from crosslmm_jax.data.synthetic import write_dataset
from crosslmm_jax.data.tokenizer import write_default_tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import Sampling, load
from crosslmm_jax.inference.commands import ask, chat
from crosslmm_jax.model import CrossLMM, init_params


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


def greedy(model, video, question: str, history, steps: int) -> list[int]:
    """Tokens by one full forward each, from the prompt that training would lay out."""
    sequence = prompt_segments(question, model.tokenizer, history=history)
    layout = lay_out(sequence, [len(video.frames)], tokens_per_frame=1, placeholder=model.tokenizer.video_pad)
    tokens, made = layout.tokens.tolist(), []
    network = CrossLMM(model.config)
    while len(made) < steps:
        visible = np.full(len(tokens), len(video.frames), np.int32)
        visible[: len(layout.tokens)] = layout.visible_frames
        logits = network.apply(
            {"params": model.params},
            {
                "frames": video.frames[None],
                "tokens": np.array([tokens], np.int32),
                "positions": np.arange(len(tokens), dtype=np.int32)[None],
                "visual_slots": np.flatnonzero(layout.visual)[None],
                "text_slots": np.setdiff1d(np.arange(len(tokens)), np.flatnonzero(layout.visual))[None],
                "visible_frames": visible[None],
            },
        )
        token = int(logits[0, -1, : model.tokenizer.vocab_size].argmax())
        if token == model.tokenizer.im_end:
            break
        made.append(token)
        tokens.append(token)
    return made


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


def test_a_long_conversation_outgrows_its_cache(model, clip):
    conversation = model.watch(clip).chat(max_new_tokens=60)
    for number in range(6):
        "".join(conversation.ask(f"Question {number}: what shape is the red object?"))
    assert conversation._cache.keys.shape[2] > 256


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


def test_commands(model_folder, clip, tmp_path, capsys, monkeypatch):
    options = {"frames": None, "max_new_tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0}
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
        ({"max_new_tokens": 5000}, "holds"),
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
        "json_path": None, "attention_path": None, "max_new_tokens": 3,
        "temperature": 0.0, "top_p": 1.0, "seed": 0,
    } | change  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        ask(**arguments)
    assert "\n" not in str(error.value)


def test_a_model_without_t2v_has_no_attention_to_draw(model, clip):
    cross = dataclasses.replace(model.config.cross_attention, directions=("v2v",))
    config = dataclasses.replace(model.config, cross_attention=cross)
    from crosslmm_jax.inference.assistant import VideoModel

    mute = VideoModel(config, model.params, model.tokenizer, model.processor, model.compiled.mesh)
    video = mute.watch(clip)
    assert isinstance(video.ask("What?", max_new_tokens=2), str)
    with pytest.raises(UserError, match="T2V"):
        video.attention("What?")
