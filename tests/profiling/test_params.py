"""Parameter counts of the released sizes against the paper's table 3 and arithmetic by hand."""

import jax
import pytest

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model import init_params
from crosslmm_jax.presets import PRESETS, get_preset, tiny
from crosslmm_jax.profiling.params import count, table


def attention(width: int, heads: int, kv_heads: int, head_dim: int, kv_width: int) -> int:
    """Qwen2's attention: bias on q, k and v only."""
    q, kv = heads * head_dim, kv_heads * head_dim
    return width * q + q + 2 * (kv_width * kv + kv) + q * width


def by_hand(config: ModelConfig) -> dict[str, int]:
    v, d = config.vision, config.decoder
    patch = 3 * v.patch_size**2 * v.width + v.width + v.num_patches * v.width
    vision_mlp = 2 * v.width * v.mlp_width + v.mlp_width + v.width
    vision_layer = 4 * (v.width**2 + v.width) + vision_mlp + 4 * v.width  # and two LayerNorms
    own = attention(d.width, d.num_heads, d.num_kv_heads, d.head_dim, d.width)
    # A direction adds its attention, a norm on queries, a norm on keys and values, and a gate, each K layers.
    cross = len(config.cross_attention_layers) * (own + 2 * d.width + 1)
    layer = own + 3 * d.width * d.mlp_width + 2 * d.width
    return {
        # The last norm is held whether it is applied or not, as in the released towers.
        "encoder": patch + v.depth * vision_layer + 2 * v.width,
        "projector": v.width * d.width + d.width + d.width**2 + d.width,
        "v2v": cross,
        "t2v": cross,
        "decoder": d.num_layers * layer + d.width,
        "embeddings": d.vocab_size * d.width * (1 if d.tie_embeddings else 2),
    }


@pytest.mark.parametrize("name", PRESETS)
def test_parts_are_those_counted_by_hand(name: str) -> None:
    assert count(get_preset(name))["parts"] == by_hand(get_preset(name))


def test_tiny_is_as_large_as_its_arrays() -> None:
    arrays = jax.tree.leaves(init_params(tiny(), jax.random.key(0)))
    assert sum(count(tiny())["parts"].values()) == sum(array.size for array in arrays)


def test_2b_trains_what_table_3_says() -> None:
    trainable = count(get_preset("crosslmm_2b"))["trainable"]
    assert trainable["stage1"] == pytest.approx(42.7e6, abs=0.1e6)
    assert trainable["stage2"] == pytest.approx(2.0e9, rel=0.05)


def test_7b_projector_and_cross_attention() -> None:
    counts = count(get_preset("crosslmm_7b"))
    assert counts["parts"]["projector"] == 16_980_992
    norms_and_gates = 7 * (2 * 3584 + 1)
    assert counts["parts"]["v2v"] == 205_553_152 + norms_and_gates
    assert counts["trainable"] == {
        "stage1": counts["parts"]["projector"] + counts["parts"]["v2v"],
        "stage2": sum(counts["parts"].values()),
    }


def test_table_shows_parts_and_stages() -> None:
    lines = table("crosslmm_2b", get_preset("crosslmm_2b")).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1, "columns line up"
    assert lines[-1].split() == ["total", "2,022.74M", "42.70M", "2,022.74M"]
    assert [line.split()[0] for line in lines[2:-1]] == [
        "encoder", "projector", "v2v", "t2v", "decoder", "embeddings",
    ]  # fmt: skip
