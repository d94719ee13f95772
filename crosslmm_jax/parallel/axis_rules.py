"""The one table from logical axes, which the model names, to mesh axes, which the user sizes."""

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from crosslmm_jax.parallel.mesh import MESH_AXES

MeshAxes = str | tuple[str, ...] | None

RULES: Mapping[str, MeshAxes] = {
    # Weights: `fsdp` cuts the width that every matrix has, `tensor` the dimension that is local to a device
    # in the maths (heads, hidden units, vocabulary), so that a layer costs one sum over `tensor`.
    "layers": None,  # the scan walks over it: a device needs every layer
    "embed": "fsdp",  # in every matrix of the decoder: gathered just before use
    "vision_embed": "fsdp",  # the same for the encoder
    "mlp": "tensor",  # hidden units do not see each other
    "vision_mlp": "tensor",  # the same for the encoder
    "heads": "tensor",  # attention heads do not see each other
    "kv_heads": "tensor",  # beside the query heads that read them
    "vision_heads": "tensor",  # the same for the encoder
    "head_dim": None,  # summed inside attention scores: cutting it would add a sum per score
    "vision_head_dim": None,  # the same for the encoder
    "vocab": "tensor",  # the loss sums over it once
    "patch": None,  # pixels of a patch and positions of a frame: small
    # Activations.
    "act_batch": ("data", "fsdp"),  # fsdp devices hold slices of weights but rows of their own
    "act_frames": ("data", "fsdp", "context", "tensor"),  # frames are independent: use every device
    "act_context": "context",  # frames of one video, as keys and values of cross-attention
    "act_len": None,  # tokens of a row: short, since a frame is 1..16 of them
    "act_embed": None,  # the residual stream is whole on every device of a row
    "act_heads": "tensor",  # follows the weights
    "act_mlp": "tensor",  # follows the weights
    "act_vocab": "tensor",  # follows the weights
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
    """How an array of `shape` whose dimensions have the logical names `axes` lies on a mesh.

    This is the one place where a dimension falls back to being replicated: when the mesh axes that its rule
    names do not divide it (2 key/value heads on `tensor=4`, rows of an odd batch).

    Raises:
      KeyError: a logical axis has no rule (a typo would otherwise replicate a large array in silence).
      ValueError: not one name a dimension, or two dimensions on the same mesh axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {tuple(axes)} do not fit an array of shape {shape}")
    wanted = [_mesh_axes(axis, rules) for axis in axes]
    used = [name for names in wanted for name in names]
    if len(set(used)) != len(used):
        raise ValueError(f"logical axes {tuple(axes)} collide: their mesh axes are {wanted}")
    entries: list[MeshAxes] = []
    for names, size in zip(wanted, shape, strict=True):
        count = 1
        for name in names:
            count *= mesh_shape[name]
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
