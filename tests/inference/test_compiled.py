"""How often answering compiles: after a warm-up, never; and that padding changes no answer."""

import dataclasses
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.batch import AllOrNone, Batch, RowOrNone
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.data.text import Tokenizer
from crosslmm_jax.errors import UserError
from crosslmm_jax.inference import VideoModel, compiled, devices, load, watching
from crosslmm_jax.inference.compiled import parts_of
from crosslmm_jax.inference.load import prepare_programs
from crosslmm_jax.inference.prepare import prepare_params
from crosslmm_jax.inference.shapes import FRAME_SIZES, QUESTION_TOKENS, padded_frames, prompt_shape
from crosslmm_jax.model import CrossLMM, init_params, logical_axes
from crosslmm_jax.parallel import make_mesh, param_shardings


@pytest.fixture(scope="module")
def compilations() -> Iterator[list[str]]:
    """Grows by one for each program that XLA compiles or reads from the cache, whoever asked for it."""
    seen: list[str] = []

    def listen(name: str, seconds: float, **_: object) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_model):
    from crosslmm_jax import presets

    folder, config = tmp_path_factory.mktemp("compiled"), presets.tiny()
    # 4 patches and few layers: time goes into programs, which grow with the layers, and not into keys.
    small = dataclasses.replace(config.vision, image_size=16, num_layers=2)
    config = dataclasses.replace(
        config, vision=small, decoder=dataclasses.replace(config.decoder, num_layers=2)
    )
    loaded = load(write_model(folder, config))
    device = jax.devices()[:1]
    params = jax.device_put(jax.device_get(loaded.params), device[0])
    mesh = make_mesh(MeshConfig(), device)
    return VideoModel(config, params, loaded.tokenizer, loaded.processor, mesh)


def video_of(model, count: int):
    rng, size = np.random.default_rng(count), model.processor.image_size
    frames = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return model.watch_frames(frames, np.arange(count, dtype=np.float32), float(count))


@pytest.mark.slow
def test_after_a_warm_up_nothing_is_compiled(model, compilations, monkeypatch):
    """80 mixed requests of 1 to 512 frames and questions of 1 to 300 tokens.

    Nor is the vocabulary gone through again.
    """
    monkeypatch.setattr(Tokenizer, "vocabulary", lambda self: pytest.fail("a dict of the whole vocabulary"))
    before = len(compilations)
    model.warm_up()
    programs = len(compilations) - before
    assert 0 < programs <= 16
    rng = np.random.default_rng(0)
    for count in [1, 512, *rng.integers(1, 513, 8).tolist()]:
        video = video_of(model, count)
        for _ in range(8):
            question = "?" * int(rng.integers(1, 301))
            assert len(model.tokenizer.encode_plain(question)) <= 300
            video.ask(question, max_new_tokens=int(rng.integers(1, 24)))
    assert len(compilations) - before == programs


def test_padding_costs_at_most_a_quarter_of_the_frames():
    counts = range(1, 513)
    assert sum(map(padded_frames, counts)) <= 1.25 * sum(counts)
    assert all(padded_frames(count) >= count for count in range(3000))
    assert max(padded_frames(count) / count for count in range(513, 4000)) < 1.5


@pytest.mark.parametrize("lengths", [[1], [64], [65], [300], [3, 130, 64]])
def test_questions_are_read_in_parts_of_one_size(lengths):
    """In order, without gaps, and every question has tokens in the last part."""
    questions = [np.arange(length) + 1000 * row for row, length in enumerate(lengths)]
    parts = parts_of(questions)
    assert all(tokens.shape == (len(lengths), QUESTION_TOKENS) for tokens, _ in parts)
    assert (parts[-1][1] > 0).all()
    for row, ids in enumerate(questions):
        read = np.concatenate([tokens[row, : counts[row]] for tokens, counts in parts])
        np.testing.assert_array_equal(read, ids)


@pytest.mark.parametrize("precision", ["compute", "int8"])
@pytest.mark.parametrize("scope", ["video", "frame", "window"])
def test_padded_frames_change_nothing(tiny_config, replace_config, make_batch, scope, precision):
    """Logits and caches of a prompt of 3 frames padded to 8 equal those of 3 frames."""
    config = replace_config(tiny_config, cross_attention={"v2v_scope": scope, "cache_dtype": precision})
    batch, frames, c = make_batch(config, batch=1, frames=3, text=8), 3, config.merge.tokens_per_frame
    params, model = {"params": init_params(config, jax.random.key(0))}, CrossLMM(config)
    length, padded = batch.tokens.shape[1], 8
    more = (padded - frames) * c
    wide = Batch.create(
        tokens=np.pad(batch.tokens, ((0, 0), (0, more + 5))),
        visual_slots=np.concatenate([batch.visual_slots, length + np.arange(more)[None]], 1).astype(np.int32),
        visible_frames=np.pad(batch.visible_frames.counts, ((0, 0), (0, more + 5))),
        frames=np.pad(batch.frames, ((0, 0), (0, padded - frames), *[(0, 0)] * 3), constant_values=99),
    )
    wide = wide._replace(visible_frames=RowOrNone(wide.visible_frames.counts))
    batch = batch._replace(visible_frames=AllOrNone(batch.visible_frames.counts))

    @jax.jit
    def answer(batch):
        counts = np.array([length], np.int32)
        visual = model.apply(params, batch.frames, method="encode")
        logits, cache = model.apply(
            params, visual, batch, counts, cache_size=64, cache_frames=10, method="prefill"
        )
        text = np.array([[5, 6, 7, 0]], np.int32)
        return logits, cache, model.apply(params, cache, text, np.array([3], np.int32), method="extend")[0]

    (logits, cache, following), (expected, of_whole, then) = answer(wide), answer(batch)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    np.testing.assert_allclose(following, then, atol=2e-5)
    for kv, whole in zip(cache.t2v, of_whole.t2v, strict=True):
        assert kv.keys.shape[1] == 10
        if precision == "int8":
            np.testing.assert_allclose(kv.key_scale, whole.key_scale, rtol=1e-5)
            np.testing.assert_allclose(kv.value_scale, whole.value_scale, rtol=1e-5)


def test_shapes_of_prompts():
    shape = prompt_shape(200, 30, tokens_per_frame=9, usual_text=32)
    assert (shape.frames, shape.text, shape.cache_frames) == (256, 32, 256)
    assert prompt_shape(100, 70, tokens_per_frame=9, usual_text=32).text == 128
    assert prompt_shape(600, 30, tokens_per_frame=9, usual_text=32).cache_frames == 768
    sizes = {prompt_shape(n, 30, tokens_per_frame=9, usual_text=32).frames for n in range(1, 513)}
    assert sizes == set(FRAME_SIZES)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "long"), [("compute", False), ("int8", True)])
def test_programs_that_were_prepared_are_those_that_run(model, monkeypatch, compilations, precision, long):
    """From shapes alone, before the weights are read, and in the dtypes that inference has."""
    for module in (watching, compiled):
        monkeypatch.setattr(module, "writes_in_place", lambda frames: long)
    config = dataclasses.replace(model.config, compute_dtype="bfloat16").at_precision(precision)
    mesh = model.compiled.mesh
    params = jax.tree.map(lambda x: x.astype("bfloat16"), init_params(config, jax.random.key(0)))
    placed = jax.device_put(params, param_shardings(logical_axes(config), params, mesh))
    prepare_programs(config, mesh, model.tokenizer, model.processor, 20)
    ready = VideoModel(
        config, prepare_params(placed, config, mesh), model.tokenizer, model.processor, mesh
    )  # fmt: skip
    before = len(compilations)
    assert len(video_of(ready, 20).ask("What?", max_new_tokens=40)) > 0
    assert len(compilations) == before


def test_what_does_not_fit_the_device_is_refused_with_what_does(monkeypatch):
    config = presets.crosslmm_2b()
    mesh = make_mesh(MeshConfig())
    monkeypatch.setattr(devices, "_memory_limit", lambda: 139 * 10**9)
    devices.check_memory(config, mesh, 4096)
    with pytest.raises(UserError, match=r"16384 frames need 1\d\d.* GB.* or give --precision int8$") as error:
        devices.check_memory(config, mesh, 16384)
    fits = int(re.search(r"at most (\d+)", str(error.value))[1])
    devices.check_memory(config, mesh, fits)
    with pytest.raises(UserError):
        devices.check_memory(config, mesh, fits + 1)
    devices.check_memory(config.at_precision("int8"), mesh, 16384)
    monkeypatch.setattr(devices, "_memory_limit", lambda: 60 * 10**9)
    with pytest.raises(UserError, match=r"GB: read at most \d+ frames$"):  # nor in 8 bits
        devices.check_memory(config, mesh, 16384)
    monkeypatch.setattr(devices, "_memory_limit", lambda: 4 * 10**9)
    with pytest.raises(UserError, match=r"GB: use devices with more memory$"):
        devices.check_memory(config, mesh, 16384)
    said = devices.cost_of(config, 4096)
    assert said.startswith(
        "4,096 frames take 36,864 positions and 33.9 GB beside the weights: original tokens"
    )


def test_devices_that_share_heads_hold_all_tokens_each():
    config, shape = presets.crosslmm_2b(), prompt_shape(4096, 0, tokens_per_frame=9, usual_text=0)
    alone, two, four = (devices.VideoBytes.of(config, shape, tensor) for tensor in (1, 2, 4))
    assert config.decoder.num_kv_heads == 2  # four devices cannot share them
    assert alone.original_tokens == two.original_tokens == four.original_tokens
    assert alone.video_cache == 2 * two.video_cache == 2 * (four.video_cache // 2)
    assert alone.text_cache == 2 * two.text_cache == four.text_cache
    # Each device makes the keys and values of all its heads at once: of one and of two.
    heads = presets.crosslmm_7b()
    assert (
        devices.VideoBytes.of(heads, shape, 4).video_cache * 4
        == devices.VideoBytes.of(heads, shape).video_cache
    )
    assert four.prefill > two.prefill


def test_a_batch_is_counted_as_a_whole(monkeypatch):
    """Videos of 2B on one device, and how many questions about them are answered together."""
    config, mesh = presets.crosslmm_2b(), make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(devices, "_memory_limit", lambda: 139 * 10**9)
    memory = devices.BatchMemory(config, mesh)
    assert memory.most_videos == devices.MOST_VIDEOS
    assert memory.fits(512, 4) and memory.fits(4096, 2) and not memory.fits(4096, 4)
    # A question about 4,096 frames has 1.1 GB of keys and values, and twice that while it is read.
    one = devices.VideoBytes.of(config, prompt_shape(4096, 0, tokens_per_frame=9, usual_text=0))
    together = memory.questions_at_once(4096, 1, 32)
    assert one.text_cache > 10**9 and 1 < together < 64
    taken = one.video_cache + one.text_cache * (1 + 2 * together)
    assert taken <= devices.BATCH_SHARE * 139e9 - devices._weight_bytes(config)
    assert memory.questions_at_once(256, 1, 32) == 32
    assert memory.questions_at_once(16384, 1, 32) == 1  # at least
    # Every device has the original tokens of all videos, also of those that others answer.
    eight = devices.BatchMemory(config, make_mesh(MeshConfig(data=8)))
    assert eight.most_videos == 8 * devices.MOST_VIDEOS
    assert eight.fits(512, 32) and memory.fits(2048, 4) and not eight.fits(2048, 32) and eight.fits(2048, 8)
    monkeypatch.setattr(devices, "_memory_limit", lambda: None)
    unknown = devices.BatchMemory(config, mesh)
    assert (unknown.most_videos, unknown.fits(10**6, 100)) == (1, True)
