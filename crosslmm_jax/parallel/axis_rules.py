"""The one table of logical axes, which the model names, -> mesh axes, which the user sizes."""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from crosslmm_jax.parallel.mesh import MESH_AXES

MeshAxes = str | tuple[str, ...] | None

RULES: Mapping[str, MeshAxes] = {
    # Weights: `fsdp` shards the width that every matrix has, `tensor` the dimension whose entries do not
    # interact (heads, hidden units, vocabulary), so that a layer takes one all-reduce over `tensor`.
    "layers": None,  # the scan iterates over it: every device needs every layer
    "embed": "fsdp",  # in every matrix of the decoder: gathered just before use
    "vision_embed": "fsdp",  # the same for the encoder
    "mlp": "tensor",  # hidden units do not interact
    "vision_mlp": "tensor",  # the same for the encoder
    "heads": "tensor",  # attention heads do not interact
    "kv_heads": "tensor",  # on the devices of the query heads that read them
    "vision_heads": "tensor",  # the same for the encoder
    "head_dim": None,  # summed over in attention scores: sharded, every score would need an all-reduce
    "vision_head_dim": None,  # the same for the encoder
    "vocab": "tensor",  # the loss sums over it once
    "lora_rank": "fsdp",  # of adapters that have no axis of width
    "patch": None,  # pixels of a patch, positions of a frame: small
    # Activations.
    "act_batch": ("data", "fsdp"),  # devices along fsdp share weights, and hold different rows
    "act_frames": ("data", "fsdp", "context", "tensor"),  # frames are independent: every device encodes some
    "act_context": "context",  # frames of one video, in K/V of cross-attention
    "act_len": None,  # tokens of a row: few, since a frame is 1 to 16 of them
    "act_embed": None,  # every device of a row holds the whole residual stream
    "act_heads": "tensor",  # follows the weights
    "act_mlp": "tensor",  # follows the weights
    "act_vocab": "tensor",  # follows the weights
    "act_head_width": "fsdp",  # "embed" of the head, which the loss gathers once
}


def activation_rules() -> dict[str, MeshAxes]:
    """The rules for activations, for `CrossLMM(config, rules=...)`."""
    return {name: axes for name, axes in RULES.items() if name.startswith("act_")}


def partition_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh_shape: Mapping[str, int],
    *,
    rules: Mapping[str, MeshAxes] = RULES,
) -> PartitionSpec:
    """How an array of `shape`, whose dimensions have the logical names `axes`, is sharded on a mesh.

    This is the one place where a dimension falls back to being replicated: where the mesh axes of its rule do
    not divide it (2 key/value heads on `tensor=4`, rows of an odd batch).

    Raises:
      KeyError: a logical axis has no rule; a typo would otherwise replicate a large array in silence.
      ValueError: not one name per dimension, or two dimensions on the same mesh axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {tuple(axes)} do not fit an array of shape {shape}")
    wanted = [_mesh_axes(axis, rules) for axis in axes]
    used = [name for names in wanted for name in names]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {tuple(axes)} collide: their mesh axes are {wanted}")
    entries: list[MeshAxes] = []
    for names, size in zip(wanted, shape, strict=True):
        count = math.prod(mesh_shape[name] for name in names)
        entries.append(names if names and size % count == 0 else None)
    return PartitionSpec(*entries)


def _mesh_axes(axis: str | None, rules: Mapping[str, MeshAxes]) -> tuple[str, ...]:
    if axis is None:
        return ()
    if axis not in rules:
        raise KeyError(f"logical axis {axis!r} has no rule in crosslmm_jax.parallel.axis_rules.RULES")
    names = rules[axis]
    names = (names,) if isinstance(names, str) else names or ()
    unknown = set(names) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"the rule of logical axis {axis!r} names mesh axes that do not exist: {unknown}")
    return names
