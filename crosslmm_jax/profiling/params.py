"""Number of parameters that each part holds and each stage trains, counted without allocating them.

Paper: table 3 (43M trainable in stage 1 of the 2B model, the full model in stage 2).
"""

import math
from typing import TypedDict

import jax

from crosslmm_jax.config import PARTS, ModelConfig, Part
from crosslmm_jax.model import init_params, logical_axes

STAGE_PARTS: dict[str, tuple[Part, ...]] = {
    "stage1": ("projector", "v2v"),  # sec. 4.1, table 2c: T2V joins in stage 2
    "stage2": PARTS,
}


class ParameterCount(TypedDict):
    """Parameters by part and by stage."""

    parts: dict[str, int]
    trainable: dict[str, int]


def count(config: ModelConfig) -> ParameterCount:
    """Parameters of `config` by part and by stage.

    `decoder` is its layers and last norm. `embeddings` is everything with a vocabulary axis: the embedding
    and the output head, if it is not tied.
    """
    abstract = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    axes = logical_axes(config)
    parts = {part: _size(abstract[part]) for part in PARTS}
    embeddings = sum(
        math.prod(leaf.shape)
        for leaf, names in zip(
            jax.tree.leaves(abstract["decoder"]),
            jax.tree.leaves(axes["decoder"], is_leaf=lambda node: isinstance(node, tuple)),
            strict=True,
        )
        if "vocab" in names
    )
    trainable = {stage: sum(parts[part] for part in trained) for stage, trained in STAGE_PARTS.items()}
    return {
        "parts": {**parts, "decoder": parts["decoder"] - embeddings, "embeddings": embeddings},
        "trainable": trainable,
    }


def _size(tree: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def table(name: str, config: ModelConfig) -> str:
    """The counts of `config` as a text table with the title `name`."""
    counts = count(config)
    rows = [["part", "parameters", *STAGE_PARTS]]
    for part, size in counts["parts"].items():
        trained_with = "decoder" if part == "embeddings" else part
        marks = ["trained" if trained_with in parts else "-" for parts in STAGE_PARTS.values()]
        rows.append([part, _millions(size), *marks])
    total = sum(counts["parts"].values())
    rows.append(["total", _millions(total), *map(_millions, counts["trainable"].values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([label.ljust(widths[0]), *padded]))
    return "\n".join([name, *lines])


def _millions(size: int) -> str:
    return f"{size / 1e6:,.2f}M"
