"""Tables of parameters: which tensor of another project is which of ours, and how it is turned.

A table has one `Rule` for each kind of parameter. `{i}` in the foreign name counts layers; ours are stacked
on a leading axis. A transform is a named pair of functions that undo each other, so one table serves both
directions.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from crosslmm_jax.config import ModelConfig

Shape = tuple[int, ...]
_STRIP = 256  # rows


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor is turned. `shape` is always that of ours, for one layer.

    Attributes:
      name: what the tables call it.
      foreign_shape: shape of ours -> shape of theirs.
      into: (theirs, shape of ours) -> ours.
      out_of: ours -> theirs.
    """

    name: str
    foreign_shape: Callable[[Shape], Shape]
    into: Callable[[np.ndarray, Shape], np.ndarray]
    out_of: Callable[[np.ndarray], np.ndarray]


def _same(shape: Shape) -> Shape:
    return shape


def _reversed(shape: Shape) -> Shape:
    return shape[::-1]


def _heads_out_shape(shape: Shape) -> Shape:
    return (shape[1] * shape[2], shape[0])


def _heads_in_shape(shape: Shape) -> Shape:
    return (shape[2], shape[0] * shape[1])


def _flat_shape(shape: Shape) -> Shape:
    return (math.prod(shape),)


def _patch_side(rows: int) -> int:
    return math.isqrt(rows // 3)


def _patch_shape(shape: Shape) -> Shape:
    side = _patch_side(shape[0])
    return (shape[1], 3, side, side)


def _image_kernel_shape(shape: Shape) -> Shape:
    side = _patch_side(shape[0])
    return (side, side, 3, shape[1])


def _with_batch(shape: Shape) -> Shape:
    return (1, *shape)


def _reshape(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.reshape(shape)


def transposed(x: np.ndarray) -> np.ndarray:
    """A transposed copy of a matrix, strip by strip: three times as fast as numpy's on large ones."""
    out = np.empty(x.shape[::-1], x.dtype)
    if x.dtype.itemsize == 2:  # numpy copies its own types faster than bfloat16
        x, filled = x.view(np.uint16), out.view(np.uint16)
    else:
        filled = out
    for begin in range(0, x.shape[0], _STRIP):
        filled[:, begin : begin + _STRIP] = x[begin : begin + _STRIP].T
    return out


def _transpose(x: np.ndarray, shape: Shape) -> np.ndarray:
    return transposed(x)


def _transpose_and_split(x: np.ndarray, shape: Shape) -> np.ndarray:
    return transposed(x).reshape(shape)


def _patch_in(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(shape)


def _patch_out(x: np.ndarray) -> np.ndarray:
    side = _patch_side(x.shape[0])
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _unsplit_out(x: np.ndarray) -> np.ndarray:
    return transposed(x.reshape(x.shape[0], -1))


def _unsplit_in(x: np.ndarray) -> np.ndarray:
    return transposed(x.reshape(-1, x.shape[-1]))


def _image_kernel_out(x: np.ndarray) -> np.ndarray:
    return x.reshape(_image_kernel_shape(x.shape))


def _unchanged(x: np.ndarray) -> np.ndarray:
    return x


def _flattened(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1)


def _batched(x: np.ndarray) -> np.ndarray:
    return x[None]


IDENTITY = Transform("identity", _same, _reshape, _unchanged)
# [out, in] <-> [in, out]
LINEAR = Transform("linear", _reversed, _transpose, transposed)
# [N*H, in] <-> [in, N, H]
HEADS_OUT = Transform("heads_out", _heads_out_shape, _transpose_and_split, _unsplit_out)
# [out, N*H] <-> [N, H, out]
HEADS_IN = Transform("heads_in", _heads_in_shape, _transpose_and_split, _unsplit_in)
# [N*H] <-> [N, H]
HEADS_BIAS = Transform("heads_bias", _flat_shape, _reshape, _flattened)
# torch's [W, 3, p, p] <-> [p*p*3, W], rows in the order (row, column, channel)
PATCH = Transform("patch", _patch_shape, _patch_in, _patch_out)
# flax's convolution kernel [p, p, 3, W] <-> [p*p*3, W]
IMAGE_KERNEL = Transform("image_kernel", _image_kernel_shape, _reshape, _image_kernel_out)
# [1, ...] <-> [...]
BATCH = Transform("batch", _with_batch, _reshape, _batched)
TRANSFORMS = (IDENTITY, LINEAR, HEADS_OUT, HEADS_IN, HEADS_BIAS, PATCH, IMAGE_KERNEL, BATCH)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of parameter.

    Attributes:
      hf: the foreign name; `{i}` is the index of the layer.
      ours: path joined by ".", e.g. "encoder.layers.wq".
      transform: one of `TRANSFORMS`.
      cut_rows: theirs may have more rows on axis 0 than ours: the vocabulary's padding.
    """

    hf: str
    ours: str
    transform: Transform = IDENTITY
    cut_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one foreign tensor: row `row` of our stacked parameter `ours` (None: all of it)."""

    hf: str
    ours: str
    row: int | None
    shape: Shape  # of ours, for one layer
    rule: Rule

    @property
    def foreign_shape(self) -> Shape:
        """The shape that the foreign tensor must have."""
        return self.rule.transform.foreign_shape(self.shape)

    def accepts(self, shape: Shape) -> bool:
        """Whether a foreign tensor of `shape` fits."""
        wanted = self.foreign_shape
        if self.rule.cut_rows and len(shape) == len(wanted) and shape[1:] == wanted[1:]:
            return shape[0] >= wanted[0]
        return shape == wanted

    def into(self, value: np.ndarray) -> np.ndarray:
        """The foreign tensor `value` as ours."""
        if self.rule.cut_rows:
            value = value[: self.foreign_shape[0]]
        return self.rule.transform.into(value, self.shape)

    def out_of(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `into` (rows that were cut stay cut)."""
        return self.rule.transform.out_of(value)


def layer_indices(ours: str, config: ModelConfig) -> Sequence[int]:
    """The layer numbers `{i}` of the parameter `ours`, in the order in which it stacks them."""
    part = ours.split(".")[0]
    if part == "encoder":
        return range(config.vision.depth)
    return range(config.decoder.num_layers) if part == "decoder" else config.cross_attention_layers


def expand(rules: Iterable[Rule], config: ModelConfig, shapes: Mapping[str, Shape]) -> list[Slot]:
    """The table with its layers written out.

    Args:
      rules: a table.
      config: of the model: how many layers there are.
      shapes: of our parameters, by path; rules for parameters that are not there are left out (the head of
        a model with tied embeddings).
    """
    slots = []
    for rule in rules:
        if rule.ours not in shapes:
            continue
        shape = tuple(shapes[rule.ours])
        if "{i}" not in rule.hf:
            slots.append(Slot(rule.hf, rule.ours, None, shape, rule))
            continue
        for row, index in enumerate(layer_indices(rule.ours, config)):
            slots.append(Slot(rule.hf.replace("{i}", str(index)), rule.ours, row, shape[1:], rule))
    return slots


def prefixed(rules: Iterable[Rule], prefix: str) -> tuple[Rule, ...]:
    """The table with `prefix` in front of the foreign names."""
    return tuple(dataclasses.replace(rule, hf=prefix + rule.hf) for rule in rules)


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Foreign tensors that are left out on purpose; `pattern` matches from the start of the name."""

    pattern: str
    reason: str

    def matches(self, name: str) -> bool:
        """Whether the tensor `name` is one of them."""
        return re.match(self.pattern, name) is not None


def shapes_of(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every parameter of a model, by path."""
    import jax

    from crosslmm_jax.model import init_params
    from crosslmm_jax.model_folder import flatten

    tree: Any = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}
