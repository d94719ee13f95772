"""Collectives read off a compiled program, and those of the step that trains stage 2."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import PARTS, MeshConfig, StageConfig
from crosslmm_jax.parallel import batch_shardings, make_mesh
from crosslmm_jax.profiling.collectives import Collective, collectives, total_bytes
from crosslmm_jax.train import abstract_state, compile_train_step

TEXT = """HloModule m

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = bf16[2,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
  ROOT %t = (s32[], f32[8]) tuple(%i, %y)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%unbounded (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %m = (f32[3]{0}, f32[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%sum
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %g = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%p), replica_groups=mesh['a'=8,'b'=1] {'a'}, \
metadata={op_name="jit(f)/head/all_gather"}
  %d = bf16[32]{0} all-gather-done(%g)
  %alone = f32[8]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%sum
  %q = u8[6]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %v = (s32[], f32[8]) while(%w), condition=%cond, body=%unbounded
}
"""


def test_text_of_hlo() -> None:
    found = collectives(TEXT)
    assert sorted(found) == [
        Collective("all-gather", 64, 8, 1, True, "jit(f)/head/all_gather"),
        Collective("all-reduce", 16, 2, 1, False, ""),
        Collective("collective-permute", 6, 2, 1, True, ""),
        Collective("reduce-scatter", 64, 4, 5, True, ""),
    ]
    assert total_bytes(found) == 64 + 16 + 6 + 5 * 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HloModule m", "no ENTRY"),
        (TEXT.replace("u8[6]", "x9[6]"), "'x9'"),
        (TEXT.replace("mesh[", "ring["), "replica_groups=ring"),
    ],
)
def test_text_that_is_not_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collectives(text)


def test_a_compiled_loop() -> None:
    """Six products, each of which gathers one layer of a stack."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    stack_lies = jax.NamedSharding(mesh, jax.P(None, "fsdp", None))

    def run(x: jax.Array, stack: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, jax.P())), None

        return jax.lax.scan(layer, x, stack)[0]

    stack = jax.ShapeDtypeStruct((6, 16, 16), jnp.float32, sharding=stack_lies)
    with jax.set_mesh(mesh):
        found = collectives(jax.jit(run).lower(jnp.ones((4, 16)), stack).compile().as_text())
    assert [(c.kind, c.array_bytes, c.group, c.runs) for c in found] == [("all-gather", 16 * 16 * 4, 8, 6)]


@pytest.mark.slow
def test_a_step_of_stage_2_gathers_weights_twice_and_reduces_their_gradients_once(make_batch) -> None:
    """Of the 2B model at its widths, two layers deep, from shapes alone.

    A CPU moves bfloat16 as float32, so every array counts four bytes per number.
    """
    config = presets.crosslmm_2b()
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_layers=3, frame_chunk=8),
        decoder=dataclasses.replace(config.decoder, num_layers=2),
        cross_attention=dataclasses.replace(config.cross_attention, cross_attn_every=1),
    )
    stage = StageConfig(
        name="stage2", trainable=PARTS, directions=("v2v", "t2v"), steps=10, learning_rate=1e-5
    )
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    batch = make_batch(config, batch=8, frames=1, text=700)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, batch_shardings(batch, mesh)
    )
    state = abstract_state(config, stage, mesh)
    with jax.set_mesh(mesh):
        found = collectives(compile_train_step(config, stage, mesh).lower(state, shapes).compile().as_text())
    head = 4 * config.decoder.vocab_size * config.decoder.width
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(state.params))
    of_head = [(c.kind, c.runs) for c in found if c.array_bytes >= head / 2]
    assert sorted(of_head) == [("all-gather", 1), ("reduce-scatter", 1)], "more than the loss moves the head"
    assert all(c.is_bounded for c in found)
    # Forward, backward, gradient; activations that change devices are small beside them.
    assert total_bytes(found) < 3.1 * (weights - head) + 2 * head
    assert total_bytes(found) > 2 * (weights - head), "this counts too little"
