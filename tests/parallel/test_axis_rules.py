"""The table of rules covers every weight of every size, and mistakes in it raise errors."""

import jax
import pytest
from jax.sharding import PartitionSpec

from crosslmm_jax.config import MeshConfig
from crosslmm_jax.model import init_params, logical_axes
from crosslmm_jax.parallel import activation_rules, make_mesh, param_shardings, partition_spec
from crosslmm_jax.parallel.mesh import MESH_AXES
from crosslmm_jax.presets import PRESETS

SIZES = {"data": 2, "fsdp": 2, "tensor": 4, "context": 1}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_weight_has_a_sharding(preset: str) -> None:
    config = PRESETS[preset]()
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    shardings = param_shardings(logical_axes(config), shapes, make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)))
    assert jax.tree.structure(shardings) == jax.tree.structure(shapes)
    large = [
        (jax.tree_util.keystr(path), sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
        )
        if leaf.size > 10**6 and sharding.is_fully_replicated
    ]
    assert large == [], "large weights that are replicated"


def test_activation_rules_name_mesh_axes() -> None:
    rules = activation_rules()
    assert rules["act_batch"] == ("data", "fsdp")
    assert set(rules["act_frames"] or ()) == set(MESH_AXES)
    assert all(name.startswith("act_") for name in rules)


def test_spec_of_a_matrix() -> None:
    assert partition_spec(("layers", "embed", "mlp"), (4, 64, 128), SIZES) == PartitionSpec(
        None, ("fsdp",), ("tensor",)
    )


def test_dimension_that_does_not_divide_is_replicated() -> None:
    two_heads = partition_spec(("embed", "kv_heads", "head_dim"), (64, 2, 16), SIZES)
    assert two_heads == PartitionSpec(("fsdp",), None, None)
    odd_batch = partition_spec(("act_batch", None), (3, 8), SIZES)
    assert odd_batch == PartitionSpec(None, None)


def test_unknown_axis() -> None:
    with pytest.raises(KeyError, match="'embd' has no rule"):
        partition_spec(("embd",), (64,), SIZES)


def test_unknown_axis_names_the_parameter() -> None:
    mesh = make_mesh(MeshConfig())
    with pytest.raises(KeyError, match=r"decoder.*w.*'embd'"):
        param_shardings({"decoder": {"w": ("embd",)}}, {"decoder": {"w": jax.numpy.zeros(4)}}, mesh)


def test_collision() -> None:
    with pytest.raises(ValueError, match="collide"):
        partition_spec(("mlp", "heads"), (64, 4), SIZES)


def test_wrong_number_of_names() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        partition_spec(("mlp",), (64, 4), SIZES)


def test_rule_that_names_no_mesh_axis() -> None:
    with pytest.raises(ValueError, match="do not exist"):
        partition_spec(("embed",), (64,), SIZES, rules={"embed": "fdsp"})
