"""Tables of parameters: which tensor of another project is which of ours, and how its axes differ.

A table has one `Rule` for each kind of parameter. `{i}` in the source name is the layer number; our layers
are stacked on a leading axis. A transform is a pair of functions, each the inverse of the other, so that one
table serves both directions.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from crosslmm_jax.config import ModelConfig
from crosslmm_jax.model_folder import Shape

_STRIP_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Transform:
    """How the axes of one tensor change. Shapes are those of one layer.

    Attributes:
      name: for messages and tests.
      source_shape: our shape -> their shape.
      into: (their tensor, our shape) -> our tensor.
      out_of: our tensor -> their tensor.
    """

    name: str
    source_shape: Callable[[Shape], Shape]
    into: Callable[[np.ndarray, Shape], np.ndarray]
    out_of: Callable[[np.ndarray], np.ndarray]


def transposed(x: np.ndarray) -> np.ndarray:
    """A transposed copy of a matrix, made in strips: three times as fast as numpy on large ones."""
    out = np.empty(x.shape[::-1], x.dtype)
    if x.dtype.itemsize == 2:  # numpy copies its own types faster than bfloat16
        x, filled = x.view(np.uint16), out.view(np.uint16)
    else:
        filled = out
    for begin in range(0, x.shape[0], _STRIP_ROWS):
        filled[:, begin : begin + _STRIP_ROWS] = x[begin : begin + _STRIP_ROWS].T
    return out


def _patch_side(rows: int) -> int:
    return math.isqrt(rows // 3)


def _patch_shape(shape: Shape) -> Shape:
    side = _patch_side(shape[0])
    return (shape[1], 3, side, side)


def _patch_out(x: np.ndarray) -> np.ndarray:
    side = _patch_side(x.shape[0])
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _image_kernel_shape(shape: Shape) -> Shape:
    side = _patch_side(shape[0])
    return (side, side, 3, shape[1])


IDENTITY = Transform("identity", lambda shape: shape, np.reshape, lambda x: x)
# [out, in] <-> [in, out]
LINEAR = Transform("linear", lambda shape: shape[::-1], lambda x, shape: transposed(x), transposed)
# [N*H, in] <-> [in, N, H]
HEADS_OUT = Transform(
    "heads_out",
    lambda shape: (shape[1] * shape[2], shape[0]),
    lambda x, shape: transposed(x).reshape(shape),
    lambda x: transposed(x.reshape(x.shape[0], -1)),
)
# [out, N*H] <-> [N, H, out]
HEADS_IN = Transform(
    "heads_in",
    lambda shape: (shape[2], shape[0] * shape[1]),
    lambda x, shape: transposed(x).reshape(shape),
    lambda x: transposed(x.reshape(-1, x.shape[-1])),
)
# [N*H] <-> [N, H]
HEADS_BIAS = Transform("heads_bias", lambda shape: (math.prod(shape),), np.reshape, np.ravel)
# torch's [W, 3, p, p] <-> [p*p*3, W], rows in the order (row, column, channel)
PATCH = Transform("patch", _patch_shape, lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape), _patch_out)
# flax's convolution kernel [p, p, 3, W] <-> [p*p*3, W]
IMAGE_KERNEL = Transform(
    "image_kernel", _image_kernel_shape, np.reshape, lambda x: x.reshape(_image_kernel_shape(x.shape))
)
# [1, ...] <-> [...]
BATCH = Transform("batch", lambda shape: (1, *shape), np.reshape, lambda x: x[None])
TRANSFORMS = (IDENTITY, LINEAR, HEADS_OUT, HEADS_IN, HEADS_BIAS, PATCH, IMAGE_KERNEL, BATCH)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of parameter.

    Attributes:
      hf: the source name; `{i}` is the layer number.
      ours: our path, joined by ".", e.g. "encoder.layers.wq".
      transform: one of `TRANSFORMS`.
      drop_rows: theirs may have more rows on axis 0 than ours: padding of the vocabulary.
    """

    hf: str
    ours: str
    transform: Transform = IDENTITY
    drop_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one source tensor: row `row` of our stacked parameter `ours`; None is all of it."""

    hf: str
    ours: str
    row: int | None
    shape: Shape  # of ours, for one layer
    rule: Rule

    @property
    def source_shape(self) -> Shape:
        """The shape that the source tensor must have."""
        return self.rule.transform.source_shape(self.shape)

    def accepts(self, shape: Shape) -> bool:
        """Whether a source tensor of `shape` fits."""
        wanted = self.source_shape
        if self.rule.drop_rows and len(shape) == len(wanted) and shape[1:] == wanted[1:]:
            return shape[0] >= wanted[0]
        return shape == wanted

    def into(self, value: np.ndarray) -> np.ndarray:
        """The source tensor `value` as ours."""
        if self.rule.drop_rows:
            value = value[: self.source_shape[0]]
        return self.rule.transform.into(value, self.shape)

    def out_of(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `into`. Rows that were dropped do not come back."""
        return self.rule.transform.out_of(value)


def layer_indices(ours: str, config: ModelConfig) -> Sequence[int]:
    """The layer numbers `{i}` of the parameter `ours`, in the order in which they are stacked."""
    part = ours.split(".")[0]
    if part == "encoder":
        return range(config.vision.depth)
    return range(config.decoder.num_layers) if part == "decoder" else config.cross_attention_layers


def expand(rules: Iterable[Rule], config: ModelConfig, shapes: Mapping[str, Shape]) -> list[Slot]:
    """Expands a table to one slot per layer.

    Args:
      rules: a table.
      config: the model configuration, for the number of layers.
      shapes: path -> shape of our parameters. Rules for parameters that are not there are skipped, e.g. for
        the head of a model with tied embeddings.
    """
    slots = []
    for rule in rules:
        if rule.ours not in shapes:
            continue
        shape = shapes[rule.ours]
        if "{i}" not in rule.hf:
            slots.append(Slot(rule.hf, rule.ours, None, shape, rule))
            continue
        for row, index in enumerate(layer_indices(rule.ours, config)):
            slots.append(Slot(rule.hf.replace("{i}", str(index)), rule.ours, row, shape[1:], rule))
    return slots


def prefixed(rules: Iterable[Rule], prefix: str) -> tuple[Rule, ...]:
    """The table with `prefix` before every source name."""
    return tuple(dataclasses.replace(rule, hf=prefix + rule.hf) for rule in rules)


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Foreign tensors that are ignored on purpose. `pattern` matches from the start of the name."""

    pattern: str
    reason: str

    def matches(self, name: str) -> bool:
        """Whether the tensor `name` is one of them."""
        return re.match(self.pattern, name) is not None
