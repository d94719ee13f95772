"""The formula against the compiler's count of an unrolled model, and against pairs counted one by one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import (
    CrossAttentionConfig,
    DecoderConfig,
    LoraConfig,
    MergeConfig,
    ModelConfig,
    StageConfig,
    VisionConfig,
)
from crosslmm_jax.model import CrossLMM, flops
from crosslmm_jax.model.flops import Workload
from crosslmm_jax.model.loss import logits_of
from crosslmm_jax.profiling.inputs import param_shapes, random_prompt, shapes_of
from crosslmm_jax.train.stages import adapter_sizes, merge, new_adapters, split, trained_shares

WORK = Workload(frames=4, text=40, before=8)


def model_of(**cross: Any) -> ModelConfig:
    """Wide enough that all but matrix products is below one part in a hundred; never run, only lowered."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=96, patch_size=8, width=1024, num_layers=3, num_heads=2, mlp_width=3072, frame_chunk=64
        ),
        merge=MergeConfig(grid=3),
        decoder=DecoderConfig(
            vocab_size=4096, width=1024, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=512,
            mlp_width=2560, rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=False, max_positions=4096,
            remat=False,
        ),
        cross_attention=CrossAttentionConfig(cross_attn_every=2, **cross),
        compute_dtype="float32",
        attention="reference",
    )  # fmt: skip


@pytest.fixture
def unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops written out, since a loop's body is counted once; nothing recomputed."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)


def counted(function: Any, *shapes: Any) -> float:
    cost: Any = jax.jit(function).lower(*shapes).cost_analysis()
    return cost["flops"]


@functools.cache
def counted_prefill(config: ModelConfig, work: Workload) -> float:
    batch = shapes_of(random_prompt(config, work))
    model = CrossLMM(config, stacked=False)

    def first_logits(params: Any, batch: Any) -> Any:
        visual = model.apply({"params": params}, batch.frames, method="encode")
        hidden: Any = model.apply({"params": params}, visual, batch, method="hidden")
        return logits_of(hidden[:, -1:], params["decoder"]["lm_head"])

    return counted(first_logits, param_shapes(config), batch)


CROSS = {
    "video": {},
    "frame": {"v2v_scope": "frame"},
    "window": {"v2v_scope": "window", "v2v_window": 1},
    "window of 3": {"v2v_scope": "window", "v2v_window": 3},
    "raw tokens": {"kv_source": "encoder"},
    "v2v alone": {"directions": ("v2v",)},
    "t2v alone": {"directions": ("t2v",)},
    "neither": {"directions": ()},
}


@pytest.mark.slow
@pytest.mark.parametrize("cross", CROSS.values(), ids=CROSS)
def test_prefill_is_what_the_compiler_counts(unrolled: None, cross: dict[str, Any]) -> None:
    config = model_of(**cross)
    expected = flops.total(flops.prefill(config, WORK, dense=True))
    assert counted_prefill(config, WORK) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "trainable", [("encoder", "projector", "v2v", "t2v", "decoder"), ("projector", "v2v")], ids=len
)
def test_train_is_what_the_compiler_counts(unrolled: None, trainable: tuple[str, ...]) -> None:
    config = model_of()
    model, shapes = CrossLMM(config), param_shapes(config, stacked=True)
    learning = {part: shapes[part] for part in trainable}

    def gradient(learning: Any, params: Any, batch: Any) -> Any:
        def loss(learning: Any) -> Any:
            return model.apply({"params": params | learning}, batch, method="loss")[0]

        return jax.grad(loss)(learning)

    count = counted(gradient, learning, shapes, shapes_of(random_prompt(config, WORK)))
    # The loss makes the logits of all positions at once when a chunk holds a target.
    targets = WORK.length(config) - 1
    learns = dict.fromkeys(trainable, 1.0)
    expected = flops.total(flops.train(config, WORK, targets=targets, learns=learns, dense=True))
    assert count == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_training_with_adapters_is_what_the_compiler_counts(unrolled: None) -> None:
    """With a frozen base: no gradient of its weights, none below the adapters of the first layer."""
    config, lora = model_of(), LoraConfig(rank=256)
    stage = StageConfig(
        name="lora",
        trainable=("projector",),
        directions=("v2v", "t2v"),
        steps=1,
        learning_rate=1e-4,
        lora=lora,
    )
    model, shapes = CrossLMM(config), param_shapes(config, stacked=True)
    trainable, frozen = split(shapes, stage)
    trainable |= jax.eval_shape(lambda: new_adapters(config, stage, jax.random.key(0)))

    def gradient(trainable: Any, frozen: Any, batch: Any) -> Any:
        def loss(trainable: Any) -> Any:
            return model.apply({"params": merge(trainable, frozen)}, batch, method="loss")[0]

        return jax.grad(loss)(trainable)

    count = counted(gradient, trainable, frozen, shapes_of(random_prompt(config, WORK)))
    sizes, learns = adapter_sizes(config, stage), trained_shares(config, stage)
    costs = flops.train(
        config, WORK, targets=WORK.length(config) - 1, learns=learns, adapters=sizes, dense=True
    )
    assert costs["lora"].total > 0.05 * flops.total(costs)
    assert count == pytest.approx(flops.total(costs), rel=0.01)


def test_decode_is_what_the_compiler_counts(unrolled: None) -> None:
    config = model_of()
    model, cached, room = CrossLMM(config, stacked=False), 76, 96

    def fill(params: Any, frames: Any, batch: Any) -> Any:
        visual = model.apply({"params": params}, frames, method="encode")
        counts = jnp.full((1,), cached, jnp.int32)
        return model.apply({"params": params}, visual, batch, counts, cache_size=room, method="prefill")

    batch = shapes_of(random_prompt(config, WORK))
    assert batch.tokens.shape == (1, cached)
    _, cache = jax.eval_shape(fill, param_shapes(config), batch.frames, batch)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def extend(params: Any, cache: Any, tokens: Any) -> Any:
        return model.apply({"params": params}, cache, tokens, jnp.ones((1,), jnp.int32), method="extend")

    # A masked program reads the whole room of its cache.
    expected = flops.total(flops.decode(config, frames=WORK.frames, cached=room - 1))
    assert counted(extend, param_shapes(config), cache, one) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
def test_doubling_frames(unrolled: None) -> None:
    """Twice the encoder, four times the global V2V attention, by the formula and by the compiler."""
    config, neither = model_of(directions=("v2v",)), model_of(directions=())
    few, many = flops.prefill(config, WORK), flops.prefill(config, WORK._replace(frames=8))
    for part in ("encoder", "pool", "projector", "v2v_kv"):
        assert many[part].total == 2 * few[part].total
    assert many["v2v"].products == 4 * few["v2v"].products
    assert many["v2v"].weights == 2 * few["v2v"].weights
    # Of a + bF + cF^2 the second difference is 2cF^2; what is quadratic without V2V is the decoder's own.
    works = [WORK._replace(frames=frames) for frames in (4, 8, 12)]
    one, two, three = (counted_prefill(config, work) - counted_prefill(neither, work) for work in works)
    assert three - 2 * two + one == pytest.approx(2 * few["v2v"].products, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "curvature"),
    [({}, 1), ({"v2v_scope": "frame"}, 0), ({"v2v_scope": "window", "v2v_window": 2}, 0)],
    ids=["video", "frame", "window"],
)
def test_growth_with_frames(unrolled: None, scope: dict[str, Any], curvature: int) -> None:
    """V2V of a frame and of a window is linear in frames, of the whole video quadratic: counted both ways."""
    config, neither = model_of(**scope, directions=("v2v",)), model_of(directions=())
    frames = (4, 8, 12)  # whole windows

    def bend(values: list[float]) -> float:
        return values[2] - 2 * values[1] + values[0]

    formula = [flops.total(flops.v2v(config, count)) for count in frames]
    work = [WORK._replace(frames=count) for count in frames]
    compiled = [counted_prefill(config, one) - counted_prefill(neither, one) for one in work]
    needed = 2 * flops.v2v(model_of(directions=("v2v",)), 4)["v2v"].products  # of c F^2, twice over 4 frames
    assert bend(formula) == pytest.approx(curvature * needed, abs=1)
    assert bend(compiled) == pytest.approx(curvature * needed, abs=0.02 * needed)


@pytest.mark.parametrize("scope", ["video", "frame", "window"])
@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_needed_pairs_are_those_that_may_be_read(scope: Any, frames: int) -> None:
    config, window = model_of(v2v_scope=scope, v2v_window=3), 3
    reads = {
        "video": lambda f, g: True,
        "frame": lambda f, g: f == g,
        "window": lambda f, g: abs(f - g) <= window,
    }[scope]
    pairs = sum(reads(f, g) for f in range(frames) for g in range(frames))
    assert flops.frame_pairs(config, frames) == pairs
    assert flops.causal_pairs(frames) == sum(g <= f for f in range(frames) for g in range(frames))


def test_text_before_the_video_reads_no_frame() -> None:
    config = model_of()
    all_read, some_read = (flops.t2v(config, WORK._replace(before=before))["t2v"] for before in (0, 10))
    assert some_read.products == 0.75 * all_read.products
    assert some_read.weights == all_read.weights


def test_released_sizes_by_hand() -> None:
    """One frame of so400m: 26 layers of 8 P W^2 + 4 P W M + 4 P^2 W, and the patch embedding."""
    config = presets.crosslmm_7b()
    p, w, m = 729, 1152, 4304
    frame = 26 * (8 * p * w * w + 4 * p * w * m + 4 * p * p * w) + 2 * p * 588 * w
    assert flops.encoder(config, 1)["encoder"].total == frame
