"""One training step: the same on any mesh and for any split, and frozen means frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax.batch import AllOrNone, VisibleFrames
from crosslmm_jax.config import MeshConfig
from crosslmm_jax.model import CrossLMM, apply, logical_axes
from crosslmm_jax.parallel import activation_rules, make_mesh, param_shardings, to_global
from crosslmm_jax.train.state import random_state, state_of_params
from crosslmm_jax.train.step import compile_train_step, with_step_visibility


@pytest.fixture(scope="module")
def random_start(micro_config, make_stage, one_device):
    """A random state, on the host."""
    return jax.device_get(random_state(micro_config, make_stage(), one_device, seed=3))


@pytest.fixture(scope="module")
def initial(random_start):
    """The parameters that every run here starts from."""
    return random_start.params


@pytest.fixture(scope="module")
def run(micro_config, initial):
    """`run(stage, mesh, batches)`: state and metrics of each step, on the host; a step is compiled once."""
    compiled = functools.cache(functools.partial(compile_train_step, micro_config))

    def steps(stage, mesh, batches):
        placed = jax.device_put(initial, param_shardings(logical_axes(micro_config), initial, mesh))
        state, reports = state_of_params(placed, micro_config, stage, mesh, seed=3), []
        with jax.set_mesh(mesh):
            for batch in batches:
                state, metrics = compiled(stage, mesh)(state, to_global(batch, mesh))
                reports.append(jax.device_get(metrics))
        return state, reports

    return steps


def assert_close(actual, expected, atol: float) -> None:
    for (path, got), wanted in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=atol, rtol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def stage(make_stage):
    """No warm-up, so that the first step changes parameters too.

    A large epsilon, since gradients that are zero but for rounding (key biases) would otherwise become steps
    of full size in a random direction.
    """
    return make_stage(warmup_ratio=0.0, eps=1e-2)


@pytest.fixture(scope="module")
def reference(run, stage, one_device, random_batches):
    """Three steps on one device."""
    return run(stage, one_device, random_batches)


@pytest.fixture(scope="module")
def random_batches(micro_config, make_batch):
    """Rows with different numbers of frames and targets."""
    frames, text = (4, 3, 2, 1, 4, 4, 3, 2), (10, 8, 5, 6, 7, 9, 4, 10)
    return [
        make_batch(micro_config, batch=8, frames=4, seed=seed, valid_frames=frames, valid_text=text)
        for seed in range(3)
    ]


@pytest.mark.slow
def test_first_loss_is_the_mean_over_all_targets(micro_config, reference, random_batches, initial) -> None:
    logits = jax.jit(CrossLMM(micro_config).apply)({"params": initial}, random_batches[0])
    log_p = jax.nn.log_softmax(np.asarray(logits, np.float64)[:, :-1])
    batch = random_batches[0]
    picked = np.take_along_axis(np.asarray(log_p), batch.tokens[:, 1:, None], axis=-1)[..., 0]
    weights = batch.loss_mask[:, 1:]
    report = reference[1][0]
    assert report["weight"] == weights.sum()
    assert report["loss"] == pytest.approx(-(picked * weights).sum() / weights.sum(), rel=1e-5)
    assert report["finite"]
    assert report["grad_norm"] > 0


@pytest.mark.slow
def test_training_changes_every_part(reference, initial) -> None:
    for part, params in reference[0].params.items():
        moved = [
            bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (params, initial[part])), strict=True)
        ]
        assert any(moved), part


@pytest.mark.slow
def test_gates_are_reported(reference) -> None:
    state, reports = reference
    for direction in ("v2v", "t2v"):
        gate = np.tanh(state.params[direction]["gate"])
        np.testing.assert_allclose(reports[-1]["gate"][direction], gate, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(data=1, fsdp=4, tensor=2),
        MeshConfig(data=2, fsdp=2, context=2),
    ],
    ids=str,
)
def test_any_mesh_gives_the_same(mesh, run, reference, random_batches, stage) -> None:
    """With one row per device and microbatch."""
    stage = dataclasses.replace(stage, microbatches=8 // (mesh.data * mesh.fsdp))
    state, reports = run(stage, make_mesh(mesh), random_batches)
    assert_close(reports, reference[1], atol=1e-5)
    assert_close(state.params, reference[0].params, atol=2e-6)


@pytest.fixture(scope="module")
def spread(micro_config, make_stage):
    """A random state on a mesh of three axes."""
    return random_state(micro_config, make_stage(), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), seed=3)


@pytest.mark.slow
def test_moments_lie_with_their_parameters(spread) -> None:
    state = spread
    shardings = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    mu = {path: spec for path, spec in shardings.items() if ".mu" in path}
    assert len(mu) == len(jax.tree.leaves(state.trainable))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.trainable):
        name = jax.tree_util.keystr(path)
        assert [spec for key, spec in mu.items() if key.endswith(name)] == [leaf.sharding.spec]
    spec = state.params["decoder"]["layers"]["w_up"].sharding.spec
    assert spec == jax.sharding.PartitionSpec(None, ("fsdp",), ("tensor",))


@pytest.mark.slow
def test_random_state_is_the_same_on_any_mesh(spread, random_start) -> None:
    pairs = zip(*map(jax.tree.leaves, (spread, random_start)), strict=True)
    assert all(np.array_equal(many, one) for many, one in pairs)


@pytest.mark.slow
def test_microbatches_equal_the_whole_batch(run, reference, random_batches, stage, one_device) -> None:
    stage = dataclasses.replace(stage, microbatches=4)
    state, reports = run(stage, one_device, random_batches)
    assert_close(reports, reference[1], atol=1e-5)
    assert_close(state.params, reference[0].params, atol=2e-6)


@pytest.mark.slow
def test_a_batch_without_a_target_changes_nothing(run, stage, one_device, random_batches) -> None:
    """Nor do moments and weight decay, which would move parameters without a gradient."""
    nothing = random_batches[1]._replace(loss_mask=np.zeros_like(random_batches[1].loss_mask))
    before, after = (
        run(stage, one_device, batches)[0] for batches in (random_batches[:1], [random_batches[0], nothing])
    )
    assert (before.step, after.step) == (1, 2)
    pairs = zip(*(jax.tree.leaves((s.trainable, s.opt_state)) for s in (before, after)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_frozen_parts_stay_bit_identical(run, random_batches, initial, make_stage, one_device) -> None:
    stage = make_stage(trainable=("projector", "v2v"), directions=("v2v",), warmup_ratio=0.0)
    state, reports = run(stage, one_device, random_batches)
    assert set(reports[0]["gate"]) == {"v2v"}
    for part in ("encoder", "t2v", "decoder"):
        pairs = zip(jax.tree.leaves(initial[part]), jax.tree.leaves(state.params[part]), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs), part
    for part in ("projector", "v2v"):
        pairs = zip(jax.tree.leaves(initial[part]), jax.tree.leaves(state.params[part]), strict=True)
        assert any(not np.array_equal(a, b) for a, b in pairs), part


@pytest.mark.slow
def test_the_models_loss_is_the_steps(reference, random_batches, micro_config, initial, one_device) -> None:
    with jax.set_mesh(one_device):
        batch = to_global(random_batches[0], one_device)
        model = CrossLMM(micro_config, rules=activation_rules())
        loss_sum, weight = jax.jit(lambda params, batch: apply(model, params, CrossLMM.loss, batch))(
            initial, batch
        )
    assert float(loss_sum / weight) == pytest.approx(float(reference[1][0]["loss"]), rel=1e-5)


@pytest.mark.slow
def test_a_step_that_knows_all_or_none_equals_one_that_does_not(
    run, micro_config, stage, one_device, make_batch
) -> None:
    """Text before a video sees nothing, text after it all frames; a row may end with its video."""
    frames, text = (4,) * 8, (10, 8, 5, 6, 7, 9, 1, 10)
    batch = make_batch(micro_config, batch=8, frames=4, valid_frames=frames, valid_text=text)
    assert set(np.unique(batch.visible_frames.counts)) == {0, 4}
    known = with_step_visibility(batch)
    assert type(known.visible_frames) is AllOrNone
    (state, reports), (expected, asked) = (run(stage, one_device, [b]) for b in (known, batch))
    assert_close(reports, asked, atol=1e-6)
    assert_close(state.params, expected.params, atol=1e-6)
    # Where it does not hold, the result is wrong.
    padded = make_batch(micro_config, batch=8, frames=4, valid_frames=(1,) * 8)
    forced = padded._replace(visible_frames=AllOrNone(padded.visible_frames.counts))
    wrong, right = (run(stage, one_device, [b])[1][0] for b in (forced, padded))
    assert abs(wrong["loss"] - right["loss"]) > 1e-4


def test_what_a_step_knows_of_visible_frames(micro_config, make_batch, random_batches, monkeypatch) -> None:
    def known(batch):
        return type(with_step_visibility(batch).visible_frames)

    assert known(random_batches[0]) is VisibleFrames  # videos of fewer frames than the row has
    whole = make_batch(micro_config, batch=2, frames=3, valid_frames=(3, 3), valid_text=(4, 4))
    assert known(whole) is AllOrNone
    nothing = whole._replace(visible_frames=VisibleFrames(np.zeros_like(whole.visible_frames.counts)))
    assert known(nothing) is AllOrNone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert known(whole) is VisibleFrames  # the other process may have other rows
