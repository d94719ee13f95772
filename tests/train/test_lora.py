"""LoRA: adapters alone learn, on any mesh; a run resumes, and its MODEL folder is a plain one."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosslmm_jax import presets
from crosslmm_jax.config import PARTS, LoraConfig, MeshConfig
from crosslmm_jax.errors import ConfigError
from crosslmm_jax.model import (
    Adapted,
    CrossLMM,
    LowRank,
    adapted_matrices,
    apply,
    cast,
    init_params,
    merge_adapters,
    without_adapters,
)
from crosslmm_jax.model.attention import video_attention
from crosslmm_jax.model_folder import flatten, load_weights, parameter_shapes
from crosslmm_jax.parallel import make_mesh, to_global
from crosslmm_jax.train import export, export_run, loop
from crosslmm_jax.train.stages import ADAPTERS, adapted_names, adapter_sizes, trained_of_model
from crosslmm_jax.train.state import abstract_state, initial_state, random_state, state_bytes_per_device
from crosslmm_jax.train.step import compile_train_step

LORA = {"trainable": ("*.gate",), "lora": LoraConfig(rank=4, alpha=8.0, lr_scale=5.0)}


@pytest.fixture(scope="module")
def stage(make_stage):
    """No warm-up, and an epsilon as in test_step.py."""
    return make_stage(**LORA, warmup_ratio=0.0, eps=1e-2)


@pytest.fixture(scope="module")
def adapted(micro_config):
    """Parameters with an adapter, none of them 0, for every matrix that can have one."""
    flat = flatten(init_params(micro_config, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    for name in adapted_matrices(micro_config):
        base, inputs = flat[name], 2 if name.endswith("wo") else 1
        (layers, *rest) = base.shape
        a, b = some(layers, *rest[:inputs], 3), 0.1 * some(layers, 3, *rest[inputs:])
        flat[name] = Adapted(base, LowRank(jnp.asarray(a), jnp.asarray(b), 0.5))
    tree: dict = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def test_what_can_be_adapted() -> None:
    matrices = {name for name in parameter_shapes(presets.tiny()) if name.split(".")[-1].startswith("w")}
    ours = {name for name in matrices if name.startswith(("decoder.layers.", "v2v.", "t2v."))}
    assert set(adapted_matrices(presets.tiny())) == ours and len(ours) == 7 + 4 + 4


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [False, True])
def test_adapters_equal_merged_weights(micro_config, make_batch, adapted, monkeypatch, chunks) -> None:
    """In the whole model, also where keys and values are made for one head at a time."""
    if chunks:
        monkeypatch.setattr(video_attention, "MAX_WHOLE_KV_BYTES", 1)
        monkeypatch.setattr(video_attention, "CHUNK_BYTES", 2**10)
    batch = make_batch(micro_config, frames=4)
    model, merged = CrossLMM(micro_config), merge_adapters(adapted)
    logits = jax.jit(lambda params: apply(model, params, CrossLMM.__call__, batch))
    expected = logits(merged)
    np.testing.assert_allclose(logits(adapted), expected, atol=1e-5)
    assert np.abs(logits(without_adapters(adapted)) - expected).max() > 1e-2
    assert {name: w.shape for name, w in flatten(merged).items()} == parameter_shapes(micro_config)


@pytest.fixture(scope="module")
def steps(micro_config, make_batch, stage):
    """`steps(mesh)`: the state before and after three steps, on the host."""
    batches = [make_batch(micro_config, batch=8, frames=4, seed=seed) for seed in range(3)]

    def run(mesh: jax.sharding.Mesh):
        state = random_state(micro_config, stage, mesh, seed=3)
        before = jax.device_get(state)
        with jax.set_mesh(mesh):
            compiled = compile_train_step(micro_config, stage, mesh)
            for batch in batches:
                state, _ = compiled(state, to_global(batch, mesh))
        return before, state

    return run


@pytest.fixture(scope="module")
def on_one_device(steps, one_device):
    return steps(one_device)


@pytest.mark.slow
def test_adapters_alone_learn(on_one_device) -> None:
    before, after = on_one_device
    assert not any(np.any(low.b) for low in flatten(before.trainable[ADAPTERS]).values())
    pairs = zip(*map(jax.tree.leaves, (before.frozen, after.frozen)), strict=True)
    assert all(np.array_equal(old, new) for old, new in pairs)
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), before.trainable, after.trainable)
    assert all(jax.tree.leaves(changed)), changed
    assert set(flatten(after.frozen)) == set(flatten(after.params)) - {"v2v.gate", "t2v.gate"}
    moments = sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(after.trainable))


@pytest.mark.slow
def test_eight_devices_equal_one(steps, on_one_device) -> None:
    _, state = steps(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    low = state.trainable[ADAPTERS]["decoder"]["layers"]["w_down"]
    spec = jax.sharding.PartitionSpec
    assert (low.a.sharding.spec, low.b.sharding.spec) == (
        spec(None, ("tensor",), ("fsdp",)), spec(None, None, ("fsdp",)),
    )  # fmt: skip
    for got, wanted in zip(*map(jax.tree.leaves, (state, on_one_device[1])), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_and_ends_with_a_plain_model(experiment, tmp_path, monkeypatch) -> None:
    """With the frozen base in bfloat16, which checkpoints and MODEL folders keep to the bit."""
    monkeypatch.setattr(loop, "compile_train_step", functools.cache(loop.compile_train_step))
    lora = dataclasses.replace(LORA["lora"], targets=("decoder.layers.w_up", "v2v.wo"))
    stage = {**LORA, "lora": lora, "steps": 4, "frozen_dtype": "bfloat16"}
    config = experiment(tmp_path / "run", stage=stage)
    checkpoint = (tmp_path / "run" / "checkpoints" / "4").absolute()
    folder = loop.train(config, quiet=True).model_folder
    whole = flatten(load_weights(folder, config.model))
    assert {name: w.shape for name, w in whole.items()} == parameter_shapes(config.model)
    shutil.rmtree(folder)
    shutil.rmtree(checkpoint)
    assert loop.train(config, quiet=True).resumed_step == 2
    again = flatten(load_weights(folder, config.model))
    assert all(np.array_equal(whole[name], again[name]) for name in whole)
    # What was trained is what the folder holds: the adapters of the checkpoint on the frozen base. It is read
    # on another mesh than the run's.
    exported = flatten(load_weights(export(tmp_path / "run", out=tmp_path / "exported").folder, config.model))
    saved = flatten(export_run._read_params(checkpoint, config))
    for name, value in saved.items():
        expected = value
        if isinstance(value, Adapted):
            low, base = jax.tree.map(np.asarray, value.low_rank), np.asarray(value.base, np.float32)
            assert value.base.dtype == jnp.bfloat16 and np.any(low.b)
            products = [np.tensordot(a, b, 1) for a, b in zip(low.a, low.b, strict=True)]
            expected = base + low.scale * np.stack(products)
        np.testing.assert_allclose(whole[name], np.asarray(expected, np.float32), atol=1e-6)
        np.testing.assert_allclose(exported[name], whole[name], atol=1e-6)
    assert saved["decoder.embedding"].dtype == jnp.bfloat16


def test_half_the_memory_of_what_is_frozen_changes_no_step(micro_config, stage, adapted) -> None:
    """A model that computes in bfloat16 reads the same numbers."""
    params, half = without_adapters(adapted), dataclasses.replace(stage, frozen_dtype="bfloat16")
    states = [initial_state(params, micro_config, each, jax.random.key(0)) for each in (stage, half)]
    read = [cast(state.frozen, "bfloat16") for state in states]
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, read), strict=True))
    norms = [state.frozen["decoder"]["layers"]["mlp_norm"] for state in states]
    assert norms[1].dtype == jnp.float32 and np.array_equal(*norms)


def test_state_of_7b_stage_2_fits_one_gpu(make_stage) -> None:
    """Parameters, moments and gradients of 8.4 billion parameters, by their shapes alone."""
    kinds = (jax.sharding.AxisType.Auto,) * 4
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 1), ("data", "fsdp", "tensor", "context"), axis_types=kinds)
    lora = LoraConfig(rank=64, alpha=16.0)
    stage = make_stage(trainable=("projector", "*.gate"), lora=lora, frozen_dtype="bfloat16")
    found = [
        state_bytes_per_device(abstract_state(presets.crosslmm_7b(), each, mesh))  # type: ignore[arg-type]
        for each in (make_stage(), stage)
    ]
    assert found[0].total == pytest.approx(135.1e9, rel=1e-3)
    assert found[1].total == pytest.approx(20.0e9, rel=2e-3)
    adapters = sum(adapter_sizes(presets.crosslmm_7b(), stage).values())
    assert adapters == 181_665_792


WRONG = [
    ({"lora": LoraConfig(rank=4, targets=("decoder.layers.wz",))}, "StageConfig.lora.targets:"
     " 'decoder.layers.wz' matches no matrix of decoder.layers, v2v or t2v; near it are decoder.layers"),
    ({"lora": LoraConfig(rank=4, targets=("encoder",))}, "'encoder' matches no matrix of decoder.layers"),
    ({"lora": LoraConfig(rank=4), "directions": ("v2v",)}, "names matrices of t2v; directions is ('v2v',)"),
    ({"lora": LoraConfig(rank=4), "trainable": ("v2v",)}, "StageConfig.lora.targets names v2v.wk, v2v.wo,"
     " v2v.wq, v2v.wv, which StageConfig.trainable names too"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_adapters_that_cannot_learn_are_refused(make_stage, fields, message) -> None:
    with pytest.raises(ConfigError) as error:
        adapted_names(presets.tiny(), make_stage(**{"trainable": (), **fields}))
    assert message in str(error.value)


def test_values_that_make_no_adapter() -> None:
    for fields, message in (
        ({"rank": -1}, "LoraConfig.rank is -1"),
        ({"alpha": 0.0}, "LoraConfig.alpha is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoraConfig(**fields)


def test_names_of_what_learns(make_stage) -> None:
    lora = LoraConfig(rank=2, targets=("v2v.w[kv]",))
    stage = make_stage(trainable=("projector.w1",), lora=lora)
    assert trained_of_model(presets.tiny(), stage) == {"projector.w1", "lora.v2v.wk", "lora.v2v.wv"}
    assert make_stage(trainable=PARTS).lora.rank == 0
