"""A video that has not ended, against watching the same frames at once."""

import dataclasses
import re
import resource
from pathlib import Path

import jax
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.data.media import Clip
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import (
    Answer,
    AnswerOptions,
    Stream,
    VideoModel,
    answer_many,
    compiled,
    devices,
    load,
    watching,
)
from crosslmm_jax.inference.shapes import prompt_shape
from crosslmm_jax.model_folder import Processor
from crosslmm_jax.parallel import make_mesh

QUESTION = "What shape is the red object?"
rng = np.random.default_rng(0)
FRAMES = rng.integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
TIMES = np.arange(48, dtype=np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_model) -> VideoModel:
    """Each compact token reads its own frame, so that what is appended later changes nothing before it."""
    folder, config = tmp_path_factory.mktemp("stream"), presets.tiny()
    cross = dataclasses.replace(config.cross_attention, v2v_scope="frame")
    # As few layers as have all parts: programs grow with them.
    vision = dataclasses.replace(config.vision, num_layers=2)
    decoder = dataclasses.replace(config.decoder, num_layers=2)
    config = dataclasses.replace(config, cross_attention=cross, vision=vision, decoder=decoder)
    return load(write_model(folder, config, system_prompt="You are a helpful assistant."))


def with_processor(model: VideoModel, processor: Processor) -> VideoModel:
    return VideoModel(model.config, model.params, model.tokenizer, processor, model.compiled.mesh)


def caches(video, frames: int) -> list[np.ndarray]:
    """Keys and values of the tokens and frames that are there."""
    cache, length = video.prefix.cache, video.prefix.lengths[0]
    tokens = [x[:, :length] for x in (*cache.keys, *cache.values)]
    return [*tokens, *(x[:, :frames] for kv in cache.t2v for x in (kv.keys, kv.values))]


def assert_same(ours, theirs, frames: int) -> None:
    assert ours.prefix.lengths == theirs.prefix.lengths and len(ours.frame_times) == frames
    for a, b in zip(caches(ours, frames), caches(theirs, frames), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert ours.ask(QUESTION, max_new_tokens=6) == theirs.ask(QUESTION, max_new_tokens=6)


@pytest.mark.slow
def test_a_stream_equals_watching_at_once_and_encodes_each_frame_once(model, monkeypatch):
    stream, encoded = Stream(model, most_frames=40), []
    encode = model.compiled.encode
    monkeypatch.setattr(
        model.compiled, "encode", lambda params, frames: (encoded.append(frames), encode(params, frames))[1]
    )
    begin, answers = 0, []
    for count in (5, 1, 3, 19):
        stream.append(FRAMES[begin : begin + count], TIMES[begin : begin + count])
        begin += count
        answers.append(stream.watched())
    shown = [frame for group in encoded for frame in group[0] if frame.any()]
    np.testing.assert_array_equal(shown, FRAMES[:28])
    monkeypatch.undo()
    assert_same(stream.watched(), model.watch_frames(FRAMES[:28], TIMES[:28], 28.0), 28)
    # What was watched before is as it was.
    assert_same(answers[1], model.watch_frames(FRAMES[:6], TIMES[:6], 6.0), 6)
    conversation = stream.watched().chat(max_new_tokens=4)
    assert "".join(conversation.ask(QUESTION)) and "".join(conversation.ask("And now?"))


@pytest.mark.slow
@pytest.mark.parametrize(("when_full", "kept"), [("thin", range(0, 48, 4)), ("drop", range(32, 48))])
def test_a_full_stream_lets_go_of_frames_and_keeps_its_memory(model, when_full, kept):
    stream, sizes = Stream(model, most_frames=16, when_full=when_full), []
    for begin in range(0, 48, 4):
        stream.append(FRAMES[begin : begin + 4], TIMES[begin : begin + 4])
        stream.watched().ask(QUESTION, max_new_tokens=1)
        sizes.append(sum(array.nbytes for array in jax.live_arrays()))
    assert stream.num_received == 48
    np.testing.assert_array_equal(stream.frame_times, TIMES[list(kept)])
    chosen = stream.frame_times.astype(int)
    again = model.watch_frames(FRAMES[chosen], TIMES[chosen], 48.0)
    assert_same(stream.watched(), again, len(chosen))
    assert len(set(sizes[1:])) == 1


@pytest.mark.nightly
def test_an_hour_of_appending_keeps_memory_flat(model, record_property):
    """One frame per second, each appended by itself, and a question every minute."""
    stream = Stream(model, most_frames=64)
    arrays, process, generator = [], [], np.random.default_rng(0)
    for second in range(3600):
        frame = generator.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
        stream.append(frame, np.array([float(second)]))
        if second % 60 == 59:
            stream.watched().ask(QUESTION, max_new_tokens=4)
            arrays.append(sum(array.nbytes for array in jax.live_arrays()))
            process.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    record_property("arrays_mb", [round(arrays[minute] / 1e6, 2) for minute in (1, 29, 59)])
    record_property("process_mb", [round(process[minute] / 1e6) for minute in (1, 29, 59)])
    assert stream.num_received == 3600 and len(set(arrays[1:])) == 1
    assert process[-1] < 1.05 * process[9]


@pytest.mark.slow
@pytest.mark.parametrize(("when_full", "tensor"), [("thin", 1), ("drop", 2)])
def test_a_stream_on_eight_devices_equals_one_on_a_single_device(model, when_full, tensor):
    """Each device with all weights, or two that share them."""
    eight = load(model.tokenizer.folder, mesh=MeshConfig(data=-1, tensor=tensor))
    device = jax.devices()[:1]
    one = VideoModel(
        model.config, jax.device_put(jax.device_get(model.params), device[0]), model.tokenizer,
        model.processor, make_mesh(MeshConfig(), device),
    )  # fmt: skip
    assert (eight.compiled.mesh.size, one.compiled.mesh.size) == (8, 1)
    streams = [Stream(each, most_frames=16, when_full=when_full) for each in (one, eight)]
    begin = 0
    for count in (5, 1, 10, 3):
        for stream in streams:
            stream.append(FRAMES[begin : begin + count], TIMES[begin : begin + count])
        begin += count
    ours, theirs = (stream.watched() for stream in streams)
    assert_same(theirs, ours, len(ours.frame_times))
    assert len(ours.frame_times) < 19


def test_times_of_a_clock(model):
    """Of the year 2026, in seconds: float32 would make them equal."""
    stream, now = Stream(model, most_frames=16), 1.78e9
    for number in range(3):
        stream.append(FRAMES[number : number + 1], np.array([now + number / 25]))
    np.testing.assert_array_equal(stream.frame_times, now + np.arange(3) / 25)


@pytest.mark.slow
def test_what_does_not_fit_the_device_is_refused_before_memory_is_taken(model, monkeypatch):
    """And of many videos, the others are answered."""

    def needed(frames: int) -> int:
        shape = prompt_shape(frames, 0, tokens_per_frame=1, usual_text=0)
        return devices.VideoBytes.of(model.config, shape).total

    limit = devices._weight_bytes(model.config) + needed(32)
    monkeypatch.setattr(devices, "_memory_limit", lambda: limit)
    monkeypatch.setattr(watching, "writes_in_place", lambda frames: frames > 32)
    monkeypatch.setattr(model.compiled, "blank_tokens", lambda frames: pytest.fail("memory is taken"))
    refusal = "40 frames need .* read at most 32 frames"
    with pytest.raises(UserError, match=refusal):
        watching.Encoding(model.compiled, model.params).begin(40)
    counts = {"a": 8, "b": 40, "c": 7}
    monkeypatch.setattr(
        model, "read", lambda media, *_, **__: (Clip(FRAMES[: counts[media]], TIMES[: counts[media]], 1.0),)
    )
    items = [(name, QUESTION, AnswerOptions(max_new_tokens=2)) for name in counts]
    one, two, three = answer_many(model, items, videos_at_once=1)
    assert isinstance(one, Answer) and isinstance(three, Answer)
    assert isinstance(two, UserError) and re.match(refusal, str(two))
    with pytest.raises(UserError, match="31 frames need"):  # a stream has its caches twice
        Stream(model, most_frames=31)


def test_what_a_stream_cannot_take_is_refused(model):
    with pytest.raises(UserError, match="most_frames is 5000; this model has positions for 1792 at most"):
        Stream(model, most_frames=5000)
    with pytest.raises(UserError, match="when_full is 'stop'; it must be thin or drop"):
        Stream(model, when_full="stop")
    stream = Stream(model, most_frames=16)
    with pytest.raises(UserError, match="there are no frames yet"):
        stream.watched()
    with pytest.raises(UserError, match=r"frames are uint8\[2, 32, 32, 3\]; give uint8\[1, 32, 32, 3\]"):
        stream.append(FRAMES[:2], TIMES[:1])
    stream.append(FRAMES[:2], TIMES[:2])
    with pytest.raises(UserError, match="times of frames do not ascend"):
        stream.append(FRAMES[:1], TIMES[1:2])
    for times in ([np.nan], [TIMES[:1]], 3.0):
        with pytest.raises(UserError, match="give a finite number for each frame"):
            stream.append(FRAMES[:1], times)
    config = model.config.at_precision("int8")
    narrow = VideoModel(config, model.params, model.tokenizer, model.processor, model.compiled.mesh)
    with pytest.raises(UserError, match="load with precision='compute'"):
        Stream(narrow)


@pytest.mark.slow
def test_text_takes_positions_too(model):
    wordy = dataclasses.replace(model.processor, system_prompt="Be brief. " * 100)
    with pytest.raises(
        UserError, match=r"most_frames is 1700; .* this model has positions for \d+ at most"
    ) as error:
        Stream(with_processor(model, wordy), most_frames=1700)
    fit = int(re.search(r"(\d+) at most", str(error.value))[1])
    assert 0 < fit < 1700 and Stream(with_processor(model, wordy), most_frames=fit)


@pytest.mark.slow
def test_tokens_of_a_long_video_are_written_to_one_place(model, monkeypatch):
    """As 600 frames are; against parts that are joined."""
    joined = model.watch_frames(FRAMES[:40], TIMES[:40], 40.0)
    for module in (watching, compiled):
        monkeypatch.setattr(module, "writes_in_place", lambda frames: frames > 32)
    assert_same(model.watch_frames(FRAMES[:40], TIMES[:40], 40.0), joined, 40)
    told: list[int] = []
    watching.Encoding(model.compiled, model.params, lambda *done: told.append(done[0])).encode(
        [Clip(FRAMES[:40], TIMES[:40], 1.0)]
    )
    assert told == [16, 32, 40]
