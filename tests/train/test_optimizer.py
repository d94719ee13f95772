"""The optimiser against torch, the schedule against its formula, and which parameters decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crosslmm_jax.model import init_params
from crosslmm_jax.train.optimizer import (
    decay_mask,
    group_of,
    group_scales,
    learning_rate_schedule,
    learning_rates,
    make_optimizer,
    map_with_path,
    warmup_steps,
)
from crosslmm_jax.train.stages import split


@pytest.mark.parametrize(("steps", "ratio"), [(1000, 0.03), (10, 0.25), (7, 0.0), (1, 0.03)])
def test_schedule(make_stage, steps: int, ratio: float) -> None:
    stage = make_stage(steps=steps, warmup_ratio=ratio, learning_rate=3e-4)
    warmup = math.ceil(ratio * steps)
    assert warmup_steps(stage) == warmup
    for count in range(steps + 1):
        if count < warmup:
            expected = 3e-4 * count / warmup
        else:
            expected = (
                3e-4 * 0.5 * (1 + math.cos(math.pi * min((count - warmup) / max(steps - warmup, 1), 1)))
            )
        assert float(learning_rate_schedule(stage)(count)) == pytest.approx(
            expected, rel=1e-5, abs=3e-4 * 1e-6
        ), count


def test_groups(make_stage, micro_config) -> None:
    stage = make_stage()
    scales = {"base": 1.0, "encoder": 0.2, "cross_attention": 2.0, "gate": 6.0, "lora": 1.0}
    assert group_scales(stage) == scales
    assert group_of(("t2v", "gate")) == "gate"
    assert group_of(("t2v", "wq")) == "cross_attention"
    assert group_of(("decoder", "layers", "w_gate")) == "base"
    some = make_stage(trainable=("projector", "v2v"), frozen=("v2v.w*",), directions=("v2v",))
    assert learning_rates(micro_config, some, 2).keys() == {"base", "cross_attention", "gate"}
    gates = make_stage(trainable=("*.gate",))
    assert learning_rates(micro_config, gates, 2) == {"gate": pytest.approx(6e-2)}
    rates = learning_rates(micro_config, stage, 2)
    assert rates["encoder"] == pytest.approx(0.2 * rates["base"])
    assert rates["base"] == pytest.approx(1e-2)


def test_decay_mask(micro_config) -> None:
    mask = decay_mask(jax.eval_shape(lambda key: init_params(micro_config, key), jax.random.key(0)))
    decayed: dict[str, set[bool]] = {}
    map_with_path(lambda path, value: decayed.setdefault(path[-1], set()).add(value), mask)
    matrices = {"wq", "wk", "wv", "wo", "w1", "w2", "w_gate", "w_up", "w_down", "embedding"}
    for name in matrices | {"patch_embedding", "position_embedding"}:
        assert decayed.pop(name) == {True}, name
    assert {"gate", "bq", "b1", "patch_bias", "attn_norm", "final_norm"} <= decayed.keys()
    assert all(values == {False} for values in decayed.values()), decayed


@pytest.mark.slow
def test_adamw_equals_torch(make_stage) -> None:
    """Eight steps with decay and a learning rate for each group; every other gradient is clipped."""
    import torch

    stage = make_stage(steps=8, clip_norm=1.0)
    rng = np.random.default_rng(0)
    shapes = {
        "encoder": {"wq": (4, 3), "bq": (3,)}, "projector": {"w1": (3, 5)},
        "v2v": {"wq": (5, 5), "gate": (2,)}, "decoder": {"embedding": (7, 5), "final_norm": (5,)},
    }  # fmt: skip
    initial = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    paths = [(part, name) for part in shapes for name in shapes[part]]
    tensors = {path: torch.nn.Parameter(torch.tensor(initial[path[0]][path[1]])) for path in paths}
    no_decay = {("encoder", "bq"), ("v2v", "gate"), ("decoder", "final_norm")}
    scale = {"encoder": 0.2, "projector": 1.0, "v2v": 2.0, "decoder": 1.0}
    scales = {path: 6.0 if path[1] == "gate" else scale[path[0]] for path in paths}
    groups = [{"params": [tensors[path]], "weight_decay": 0.0 if path in no_decay else 0.1} for path in paths]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(stage.b1, stage.b2), eps=stage.eps)

    ours, params = make_optimizer(stage), jax.tree.map(jnp.asarray, initial)
    state = ours.init(params)
    for step in range(8):
        size = 3.0 if step % 2 else 0.01  # above and below clip_norm
        grads = jax.tree.map(
            lambda p, size=size: (size * rng.normal(size=p.shape)).astype(np.float32), initial
        )
        updates, state = ours.update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
        for path, group in zip(paths, theirs.param_groups, strict=True):
            tensors[path].grad = torch.tensor(grads[path[0]][path[1]])
            group["lr"] = scales[path] * float(learning_rate_schedule(stage)(step))
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), 1.0)
        theirs.step()
    for part, name in paths:
        expected = tensors[part, name].detach().numpy()
        assert np.abs(expected - initial[part][name]).max() > 1e-3
        np.testing.assert_allclose(params[part][name], expected, atol=2e-6, rtol=2e-6)  # type: ignore[index]


def test_frozen_parts_have_no_moments(make_stage, micro_config) -> None:
    stage = make_stage(trainable=("projector", "v2v"), directions=("v2v",))
    shapes = jax.eval_shape(lambda key: init_params(micro_config, key), jax.random.key(0))
    trainable, _ = split(shapes, stage)
    state = jax.eval_shape(make_optimizer(stage).init, trainable)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    gates = trainable["v2v"]["gate"].size
    assert sizes == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable))
    assert gates > 0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)
