"""The rule tables: each transform undoes itself, and every parameter has exactly one rule."""

import collections
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm_jax import presets
from crosslmm_jax.convert.families import llava, qwen2, siglip
from crosslmm_jax.convert.plan import copied_parameters
from crosslmm_jax.convert.rules import (
    BATCH,
    HEADS_BIAS,
    HEADS_IN,
    HEADS_OUT,
    IDENTITY,
    IMAGE_KERNEL,
    LINEAR,
    PATCH,
    TRANSFORMS,
    expand,
    transposed,
)
from crosslmm_jax.model import copy_cross_attention, init_params
from crosslmm_jax.model_folder import parameter_shapes

SIZES = st.integers(1, 5)
SHAPES = {
    IDENTITY: st.lists(SIZES, min_size=0, max_size=3).map(tuple),
    LINEAR: st.tuples(SIZES, SIZES),
    HEADS_OUT: st.tuples(SIZES, SIZES, SIZES),
    HEADS_IN: st.tuples(SIZES, SIZES, SIZES),
    HEADS_BIAS: st.tuples(SIZES, SIZES),
    PATCH: st.tuples(SIZES.map(lambda side: 3 * side**2), SIZES),
    IMAGE_KERNEL: st.tuples(SIZES.map(lambda side: 3 * side**2), SIZES),
    BATCH: st.lists(SIZES, min_size=1, max_size=3).map(tuple),
}


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_transforms_undo_themselves(transform, data) -> None:
    shape = data.draw(SHAPES[transform])
    ours = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    theirs = transform.out_of(ours)
    assert theirs.shape == transform.source_shape(shape)
    np.testing.assert_array_equal(transform.into(theirs, shape), ours)
    again = np.random.default_rng(0).permutation(ours.size).astype(np.float32).reshape(theirs.shape)
    np.testing.assert_array_equal(transform.out_of(transform.into(again, shape)), again)


@pytest.mark.parametrize("shape", [(1, 1), (255, 3), (256, 2), (600, 7)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_fast_transpose_is_a_transpose(shape, dtype) -> None:
    x = np.arange(np.prod(shape)).reshape(shape).astype(jax.numpy.dtype(dtype))
    assert transposed(x).flags.c_contiguous
    np.testing.assert_array_equal(transposed(x), x.T)


CONFIGS = {name: presets.get_preset(name) for name in presets.PRESETS}


def variants():
    tiny = CONFIGS["tiny"]
    cross = tiny.cross_attention
    yield "norm", replace(tiny, merge=replace(tiny.merge, projector_input_norm=True))
    yield "encoder_kv", replace(tiny, cross_attention=replace(cross, kv_source="encoder"))
    yield "every_1", replace(tiny, cross_attention=replace(cross, cross_attn_every=1))
    yield "last", replace(tiny, cross_attention=replace(cross, cross_attn_every=2, cross_attn_offset=3))
    yield "untied", replace(tiny, decoder=replace(tiny.decoder, tie_embeddings=False))


@pytest.mark.slow
@pytest.mark.parametrize("name,config", [*CONFIGS.items(), *variants()])
def test_every_parameter_has_exactly_one_rule(name, config) -> None:
    shapes = parameter_shapes(config)
    slots = expand(llava.EXPORT_RULES, config, shapes)
    assert {slot.ours for slot in slots} == set(shapes)
    assert len({slot.hf for slot in slots}) == len(slots)
    filled = collections.Counter((slot.ours, slot.row) for slot in slots)
    assert set(filled.values()) == {1}
    for ours, shape in shapes.items():
        rows = sorted(slot.row for slot in slots if slot.ours == ours and slot.row is not None)
        assert rows == list(range(shape[0])) if rows else filled[ours, None] == 1
    sizes = collections.Counter()
    for slot in slots:
        sizes[slot.ours] += int(np.prod(slot.source_shape))
    assert sizes == {ours: int(np.prod(shape)) for ours, shape in shapes.items()}


def test_big_vision_rules_cover_the_encoder() -> None:
    shapes = parameter_shapes(CONFIGS["crosslmm_7b_vitg"])
    slots = expand(siglip.BIG_VISION_RULES, CONFIGS["crosslmm_7b_vitg"], shapes)
    assert {slot.ours for slot in slots} == {name for name in shapes if name.startswith("encoder.")}
    assert len({(slot.ours, slot.row) for slot in slots}) == len({slot.hf for slot in slots}) == len(slots)


def test_names_are_those_of_the_released_checkpoints() -> None:
    """A few shapes of Qwen2.5-7B and SigLIP2-so400m, written out."""
    config = CONFIGS["crosslmm_7b"]
    shapes = {
        slot.hf: slot.source_shape for slot in expand(llava.EXPORT_RULES, config, parameter_shapes(config))
    }
    assert shapes["model.layers.27.mlp.gate_proj.weight"] == (18944, 3584)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (512, 3584)
    assert shapes["model.layers.24.v2v_attn.o_proj.weight"] == (3584, 3584)
    assert shapes["model.layers.4.t2v_gate"] == ()
    assert "model.layers.5.t2v_gate" not in shapes
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (152064, 3584)
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (1152, 3, 14, 14)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (729, 1152)
    assert shapes["vision_model.encoder.layers.25.mlp.fc1.weight"] == (4304, 1152)
    assert "vision_model.encoder.layers.26.mlp.fc1.weight" not in shapes


def test_ignored_names_are_none_that_are_used() -> None:
    config = CONFIGS["crosslmm_2b"]
    names = [slot.hf for slot in expand(llava.EXPORT_RULES, config, parameter_shapes(config))]
    ignored = [*llava.ignored(config), *qwen2.ignored(config)]
    assert not [name for name in names if any(rule.matches(name) for rule in ignored)]
    above = f"{siglip.PREFIX}encoder.layers.26.mlp.fc1.weight"
    assert any(rule.matches(above) for rule in ignored)
    assert not any(
        re.match(rule.pattern, f"{siglip.PREFIX}encoder.layers.2.mlp.fc1.weight") for rule in ignored
    )


@pytest.mark.parametrize("kv_source", ["projected", "encoder"])
def test_copies_are_those_of_the_model(tiny_config, replace_config, kv_source) -> None:
    config = replace_config(tiny_config, cross_attention={"kv_source": kv_source, "cross_attn_init": "copy"})
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    expected = copy_cross_attention(params, config)
    changed = set()
    for direction in ("v2v", "t2v"):
        for name, value in expected[direction].items():
            if not np.array_equal(value, params[direction][name]):
                changed.add(f"{direction}.{name}")
    copies = copied_parameters(config)
    assert changed == set(copies)
    for target, source in copies.items():
        direction, name = target.split(".")
        layers = params["decoder"]["layers"][source.split(".")[-1]]
        np.testing.assert_array_equal(expected[direction][name], layers[list(config.cross_attention_layers)])
